module hauberk.dev/test/interop/suites/testdata/websocket

go 1.26.0

require github.com/coder/websocket v1.8.15 // indirect
