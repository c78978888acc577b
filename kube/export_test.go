package kube

// Config lets tests use an access with any client.
var Config = Access.config
