package qemu

func abandon(run string) int { return 1 }
