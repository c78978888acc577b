// Package mesh is the protocol between the agent of a node and the node's
// proxy: messages of JSON with file descriptors beside them, over a Unix
// socket that keeps message boundaries (SOCK_SEQPACKET).
//
// The node dials. It gives the proxy everything the proxy has: the sandboxes,
// their sockets, the plan, the revocation epochs. The proxy asks the node for
// two things, certificates and more sockets, and tells it what it refused.
// Every request is answered by one ack, with an error or without.
//
// The two ends do not trust each other alike. The proxy faces the network and
// may be taken over: the node checks all it says. The proxy believes the node.
package mesh

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"hauberk.dev/plan"
)

// Version of the protocol. It rises with every change that an older peer
// would misread.
//
//	1  2026-11: first.
const Version = 1

// Bounds of the protocol.
const (
	MaxMessage = 64 << 10 // bytes of one datagram; more goes through a memfd
	MaxFiles   = 128      // descriptors beside one message
	MaxSockets = 64       // descriptors one request for sockets may ask for
	maxName    = 256      // bytes of an instance, name or namespace
)

// Kind of a message.
type Kind string

// The kinds. From the node: Hello to Ping; from the proxy: CSR to Event; from
// both: Ack.
const (
	KindHello   Kind = "hello"
	KindAdd     Kind = "add-sandbox" // files: transparent listener, DNS over UDP, DNS over TCP
	KindRemove  Kind = "remove-sandbox"
	KindPlan    Kind = "plan"
	KindGateway Kind = "gateway" // files: the HBONE listener
	KindPublish Kind = "publish" // files: one listener on each Publish.Ports
	KindCut     Kind = "cut"
	KindStats   Kind = "stats"
	KindPing    Kind = "ping"
	KindTap     Kind = "tap"     // answered with what passed since the last one
	KindCarried Kind = "carried" // answered with those of Connections that are not the proxy's
	KindLearnt  Kind = "learnt"  // answered with what was Learnt of a service's requests
	KindRelearn Kind = "relearn" // gives back what was Learnt, before the plan

	KindCSR     Kind = "csr"     // answered with a Certificate
	KindSockets Kind = "sockets" // answered with Count files
	KindEvent   Kind = "event"

	KindAck Kind = "ack"
)

// Message is everything that can be said; which fields a kind wants is
// checked on both sides.
type Message struct {
	Kind Kind   `json:"kind"`
	Seq  uint64 `json:"seq"` // in an ack, that of the request
	// Error says why a request was refused.
	Error string `json:"error,omitempty"`
	// Large means that the whole message is in the last file.
	Large bool `json:"large,omitempty"`

	Hello       *Hello        `json:"hello,omitempty"`
	Sandbox     *plan.Sandbox `json:"sandbox,omitempty"`
	Instance    string        `json:"instance,omitempty"`
	Plan        *plan.Mesh    `json:"plan,omitempty"`
	Publish     *Publish      `json:"publish,omitempty"`
	Epoch       *plan.Epoch   `json:"epoch,omitempty"`
	Receipt     *Receipt      `json:"receipt,omitempty"`
	Stats       *Stats        `json:"stats,omitempty"`
	CSR         []byte        `json:"csr,omitempty"` // PKCS #10, DER
	Certificate *Certificate  `json:"certificate,omitempty"`
	Count       int           `json:"count,omitempty"`
	Event       *Event        `json:"event,omitempty"`
	Tap         uint64        `json:"tap,omitempty"` // who taps, chosen by the asker
	Tapped      *Tapped       `json:"tapped,omitempty"`
	Connections []Connection  `json:"connections,omitempty"`
	Learnt      *Learnt       `json:"learnt,omitempty"`
}

// MaxLearnt is how long the schema of one service may be, in bytes.
const MaxLearnt = 12 << 20

// Learnt is what a proxy has learnt of the requests to a service: an exported
// schema (mesh/inspect), which the node keeps and does not read. In the question it
// is empty, and in the answer too if nothing is known.
type Learnt struct {
	Service string `json:"service"` // "namespace/name"
	Schema  []byte `json:"schema,omitempty"`
}

// Useless begins the refusal of a Relearn whose schema nobody could go on from. It
// is in words, as a field that an older node does not know would end its link.
const Useless = "what was learnt is of no use: "

// MaxConnections bounds what one message asks of.
const MaxConnections = 1024

// Connection is one of TCP in the namespace of a sandbox, as the kernel of the
// node sees it.
type Connection struct {
	Local  netip.AddrPort `json:"local"`  // where the sandbox wanted to go, or from where it is called
	Remote netip.AddrPort `json:"remote"` // the sandbox
}

// Tapped are requests of one instance, as they passed. A tap that nobody asks for
// any more ends by itself.
type Tapped struct {
	Requests []Request `json:"requests,omitempty"`
	Lost     uint64    `json:"lost,omitempty"` // for want of room, since the last answer
}

// Request is what is noted of one request where it arrived.
type Request struct {
	At       time.Time `json:"at"`
	Instance string    `json:"instance"`
	Service  string    `json:"service"`
	Protocol string    `json:"protocol"`
	Peer     string    `json:"peer"` // identity, or "anonymous"
	Source   string    `json:"source,omitempty"`
	Method   string    `json:"method,omitempty"`
	Path     string    `json:"path,omitempty"` // or the service of an RPC protocol
	// Verdict is allowed, denied, malformed or failed; Rule decided, if one did.
	Verdict string `json:"verdict"`
	Rule    string `json:"rule,omitempty"`
	Reason  string `json:"reason,omitempty"`
	// Status of the answer, 0 if it is not known; GRPC that of a call of gRPC.
	Status   int    `json:"status,omitempty"`
	GRPC     string `json:"grpc,omitempty"`
	Received int64  `json:"received"` // bytes that were announced or seen
	Sent     int64  `json:"sent"`
	Micros   int64  `json:"micros"`
	Trace    string `json:"trace,omitempty"`
	// Header holds the fields of the request, for taps only. Values that are
	// secrets are left out.
	Header []Header `json:"header,omitempty"`
	// Lost requests before this one, for want of room; then nothing else is said.
	Lost uint64 `json:"lost,omitempty"`
}

// Header is a field of a request.
type Header struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// Hello opens the link, and comes back in its ack.
type Hello struct {
	Version int `json:"version"`
	// Process is the pid of the sender, for logs.
	Process int `json:"process"`
}

// Publish lists the ports open on the node's loopback address. It replaces the
// list before it.
type Publish struct {
	Ports []PublishedPort `json:"ports"`
}

// PublishedPort leads callers without an identity to a port of a service.
type PublishedPort struct {
	Namespace string `json:"namespace"`
	Service   string `json:"service"`
	Port      uint16 `json:"port"`
}

// Certificate is an issued identity.
type Certificate struct {
	Chain [][]byte `json:"chain"` // DER, leaf first
	Roots string   `json:"roots"` // PEM
}

// Receipt says what a cut did. When it is sent, nothing that matches the epoch
// is connected any more and nothing that matches it can connect.
type Receipt struct {
	Epoch uint64 `json:"epoch"`
	// Connections cut, in total and by local instance.
	Connections int            `json:"connections"`
	Instances   map[string]int `json:"instances,omitempty"`
	Micros      int64          `json:"micros"` // the time it took
}

// Stats are totals since the proxy started, and what is open now.
type Stats struct {
	Process    int                      `json:"process"`
	Started    time.Time                `json:"started"`
	Generation uint64                   `json:"generation"` // of the plan in force
	Epoch      uint64                   `json:"epoch"`
	Sandboxes  map[string]InstanceStats `json:"sandboxes,omitempty"`
	// Flows open now, at most MaxFlows of them.
	Flows      []Flow `json:"flows,omitempty"`
	FlowsTotal int    `json:"flowsTotal"`
	EventsLost uint64 `json:"eventsLost"`
	Goroutines int    `json:"goroutines,omitempty"`
	// Analysis of services whose plan has them looked at, by "namespace/name".
	Analysis map[string]Analysis `json:"analysis,omitempty"`
}

// Analysis counts what was looked at and what was found.
type Analysis struct {
	// Since when what is normal is learnt, in this process or those before it, and
	// from how many requests.
	Since  time.Time `json:"since,omitzero"`
	Learnt uint64    `json:"learnt,omitempty"`

	Requests uint64 `json:"requests"`
	Bytes    uint64 `json:"bytes"` // of bodies
	// Found, by the name of the finding, and Done, by that of the action.
	Found map[string]uint64 `json:"found,omitempty"`
	Done  map[string]uint64 `json:"done,omitempty"`
	// What has had no room of its own.
	RoutesOver  uint64 `json:"routesOver,omitempty"`
	CallersOver uint64 `json:"callersOver,omitempty"`
	FieldsOver  uint64 `json:"fieldsOver,omitempty"`
	// Bytes copied to an analyser, and those it was too slow for.
	Mirrored     uint64 `json:"mirrored,omitempty"`
	MirrorMissed uint64 `json:"mirrorMissed,omitempty"`
}

// MaxFlows bounds the list in Stats.
const MaxFlows = 4096

// InstanceStats are those of one sandbox.
type InstanceStats struct {
	Open    int    `json:"open"`
	Total   uint64 `json:"total"`
	Refused uint64 `json:"refused"`
	// WouldDeny counts what rules in audit would have refused.
	WouldDeny uint64 `json:"wouldDeny,omitempty"`
	BytesIn   uint64 `json:"bytesIn"`  // to the sandbox
	BytesOut  uint64 `json:"bytesOut"` // from it
	// Serial and NotAfter of the certificate in use, "" if there is none.
	Serial   string    `json:"serial,omitempty"`
	NotAfter time.Time `json:"notAfter,omitzero"`
	// Identity says why there is no valid certificate.
	Identity string `json:"identity,omitempty"`
}

// Flow is one live connection.
type Flow struct {
	Instance  string    `json:"instance"`  // the local side
	Direction string    `json:"direction"` // "in", "out" or "egress"
	Peer      string    `json:"peer"`      // identity, or "anonymous"
	Serial    string    `json:"serial,omitempty"`
	Address   string    `json:"address"` // where it goes
	Since     time.Time `json:"since"`
	Sent      uint64    `json:"sent"`
	Received  uint64    `json:"received"`
}

// EventKind says what happened.
type EventKind string

// The kinds of events.
const (
	EventAccessDenied  EventKind = "AccessDenied"    // a rule, or the lack of one, refused a call
	EventWouldDeny     EventKind = "WouldDeny"       // a rule or policy in audit would have refused a call
	EventEgressRefused EventKind = "EgressRefused"   // the workload dialled what is neither service nor allowed
	EventPeerRefused   EventKind = "PeerRefused"     // the other side proved no identity, or the wrong one
	EventNoIdentity    EventKind = "NoIdentity"      // the local side has no valid certificate
	EventRevoked       EventKind = "Revoked"         // a revoked party tried to connect
	EventUnreachable   EventKind = "Unreachable"     // no endpoint took the connection
	EventBadRequest    EventKind = "BadRequest"      // HTTP that may not be passed on
	EventLimit         EventKind = "Limit"           // a bound was reached
	EventIdentity      EventKind = "IdentityRenewed" // a certificate was obtained
	EventFinding       EventKind = "Finding"         // a request, or a caller, was found out of the ordinary
	EventIncident      EventKind = "Incident"        // the same, and Offender is to be contained for it
)

// Event is something a person may ask about later.
type Event struct {
	Kind     EventKind `json:"kind"`
	At       time.Time `json:"at"`
	Instance string    `json:"instance,omitempty"` // the local side
	Peer     string    `json:"peer,omitempty"`     // identity, or "anonymous"
	// Offender is the instance that called, of an Incident.
	Offender string `json:"offender,omitempty"`
	// Source and Destination are addresses; Service is "name.namespace".
	Source      string `json:"source,omitempty"`
	Destination string `json:"destination,omitempty"`
	Service     string `json:"service,omitempty"`
	// Rule that decided, if one did; Reason in words.
	Rule   string `json:"rule,omitempty"`
	Reason string `json:"reason"`
	// Lost events since the last one, for want of room.
	Lost uint64 `json:"lost,omitempty"`
}

// UnknownError is said of a request that is sound and of a kind, or with fields,
// that are not known here: one of a newer peer. It can be answered by Seq, and
// the connection goes on.
type UnknownError struct {
	Kind Kind
	Seq  uint64
	err  error
}

func (e *UnknownError) Error() string { return fmt.Sprintf("message %q: %v", e.Kind, e.err) }

func (e *UnknownError) Unwrap() error { return e.err }

// Check refuses a message whose fields are not those of its kind, or that came
// with the wrong number of files.
func (m *Message) Check(files int) error {
	err := m.check(files)
	if _, ok := err.(*UnknownError); ok || err == nil {
		return err
	}
	return fmt.Errorf("message %q: %w", m.Kind, err)
}

var (
	errKind   = errors.New("unknown kind")
	errFields = errors.New("a field is missing or malformed")
)

func (m *Message) check(files int) error {
	want := 0
	ok := true
	if m.Error != "" && m.Kind != KindAck {
		return errors.New("an error belongs to an ack")
	}
	switch m.Kind {
	case KindHello:
		ok = m.Hello != nil
	case KindAdd:
		ok, want = m.Sandbox != nil && isName(m.Sandbox.Instance) && m.Sandbox.Address.Is4(), 3
	case KindRemove:
		ok = isName(m.Instance)
	case KindTap:
		ok = isName(m.Instance) && m.Tap != 0
	case KindCarried:
		ok = isName(m.Instance) && len(m.Connections) > 0 && len(m.Connections) <= MaxConnections
	case KindPlan:
		ok = m.Plan != nil
	case KindGateway:
		want = 1
	case KindPublish:
		if ok = m.Publish != nil && len(m.Publish.Ports) <= MaxFiles; ok {
			want = len(m.Publish.Ports)
		}
	case KindCut:
		ok = m.Epoch != nil
	case KindLearnt:
		ok = m.Learnt != nil && isService(m.Learnt.Service) && len(m.Learnt.Schema) == 0
	case KindRelearn:
		ok = m.Learnt != nil && isService(m.Learnt.Service) && len(m.Learnt.Schema) > 0 && len(m.Learnt.Schema) <= MaxLearnt
	case KindStats, KindPing:
	case KindCSR:
		ok = isName(m.Instance) && len(m.CSR) > 0 && len(m.CSR) <= 8<<10
	case KindSockets:
		ok = isName(m.Instance) && m.Count > 0 && m.Count <= MaxSockets
	case KindEvent:
		ok = m.Event != nil && m.Event.Kind != "" && len(m.Event.Kind) <= maxName && len(m.Event.Instance) <= maxName && len(m.Event.Offender) <= maxName
	case KindAck:
		// What the ack of a request must hold is for the one who asked.
		if files > MaxSockets {
			return fmt.Errorf("%d files, at most %d are allowed", files, MaxSockets)
		}
		return nil
	default:
		return &UnknownError{m.Kind, m.Seq, errKind}
	}
	if !ok {
		return errFields
	}
	if files != want {
		return fmt.Errorf("%d files, want %d", files, want)
	}
	return nil
}

func isService(s string) bool {
	namespace, name, ok := strings.Cut(s, "/")
	return ok && isName(namespace) && isName(name)
}

func isName(s string) bool {
	if s == "" || len(s) > maxName {
		return false
	}
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c >= 0x7f || c == '/' {
			return false
		}
	}
	return true
}
