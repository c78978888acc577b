package guestproto

// DeviceMAC is the hardware address of a machine's n-th network device before
// the guest changes it. All clones of a template wake up with the same.
func DeviceMAC(n int) [6]byte { return [6]byte{0x02, 0x48, 0x4e, 0, 0, byte(n)} }
