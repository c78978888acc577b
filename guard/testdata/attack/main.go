// Command attack is one attack.
package main

func main() {}
