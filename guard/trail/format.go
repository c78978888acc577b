package trail

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"time"

	"hauberk.dev/api/spec"
)

// Formats in which records are written.
const (
	Text = "text"
	JSON = "json" // a Record a line
	OCSF = "ocsf" // an event of the Open Cybersecurity Schema Framework a line
	OTel = "otel" // a request of OTLP/HTTP for logs a line
)

// ocsfVersion is the version of the schema that OCSF events follow.
const ocsfVersion = "1.3.0"

// Write writes one record and a line feed.
func Write(w io.Writer, format string, r Record) error {
	var v any
	switch format {
	case Text:
		_, err := fmt.Fprintln(w, Line(r))
		return err
	case JSON:
		v = r
	case OCSF:
		v = ocsf(r)
	case OTel:
		v = otel(r)
	default:
		return fmt.Errorf("format %q: want text, json, ocsf or otel", format)
	}
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

// Line is a record as people read it. All that comes from the workload is
// quoted, so that it cannot speak to a terminal.
func Line(r Record) string {
	where := r.Sandbox.Namespace + "/" + r.Sandbox.Workload
	if r.Sandbox.Workload == "" {
		where = r.Sandbox.ID
	}
	text := fmt.Sprintf("%s %s %s", r.Time.Local().Format("2006-01-02 15:04:05.000"), strconv.QuoteToGraphic(where), clean(r.Text))
	if r.Policy != "" {
		text += " by policy " + strconv.QuoteToGraphic(r.Policy)
	}
	if r.Count > 1 {
		text += fmt.Sprintf(" (%d times)", r.Count)
	}
	if r.Process.Exe != "" {
		text += " as " + strconv.QuoteToGraphic(r.Process.Exe)
	}
	for _, a := range r.Process.Lineage {
		text += fmt.Sprintf(" < %s(%d)", strconv.QuoteToGraphic(a.Name), a.PID)
	}
	return text
}

// clean makes every character that is not plain visible.
func clean(s string) string {
	quoted := strconv.QuoteToGraphic(s)
	out := make([]byte, 0, len(quoted))
	for i := 1; i < len(quoted)-1; i++ {
		if quoted[i] == '\\' && (quoted[i+1] == '"' || quoted[i+1] == '\\') {
			i++
		}
		out = append(out, quoted[i])
	}
	return string(out)
}

type object map[string]any

// Classes of OCSF: category, class and activity.
type class struct {
	category, class, activity int
	name                      string
}

// classOf is what an event is to OCSF: something refused is a finding; what was
// allowed is the activity itself.
func classOf(r Record) class {
	if r.Verdict != "allowed" {
		return class{2, 2004, 1, "Detection Finding"}
	}
	switch {
	case r.Op == "started":
		return class{1, 1007, 1, "Process Activity"}
	case r.Op == "dns":
		return class{4, 4003, 1, "DNS Activity"}
	case r.Target != "":
		return class{4, 4001, 1, "Network Activity"}
	case r.Path != "":
		return class{1, 1001, 3, "File System Activity"}
	}
	return class{1, 1007, 99, "Process Activity"}
}

func ocsf(r Record) object {
	c := classOf(r)
	severity, name := ocsfSeverity(r)
	out := object{
		"category_uid": c.category, "class_uid": c.class, "class_name": c.name, "activity_id": c.activity, "type_uid": c.class*100 + c.activity,
		"time": r.Time.UnixMilli(), "severity_id": severity, "severity": name, "message": r.Text, "count": r.Count,
		"metadata": object{"version": ocsfVersion, "log_name": "hauberk guard", "sequence": r.Sequence,
			"product": object{"name": "Hauberk Guard", "vendor_name": "Hauberk"}},
		"device":   object{"type_id": 6, "type": "Virtual", "uid": r.Sandbox.ID, "hostname": r.Sandbox.ID, "image": object{"uid": r.Sandbox.ImageDigest, "name": r.Sandbox.Image}},
		"unmapped": object{"hauberk": r},
	}
	process := ocsfProcess(r)
	out["actor"] = object{"process": process}
	if c.class == 2004 {
		disposition := 2 // Blocked
		if r.Verdict == "reported" || r.Verdict == VerdictLost {
			disposition = 17 // Logged
		}
		evidence := object{"process": process}
		ocsfTarget(evidence, r)
		delete(out, "actor")
		out["evidences"] = []object{evidence}
		out["disposition_id"], out["is_alert"], out["status_id"] = disposition, true, 1
		out["finding_info"] = object{"uid": fmt.Sprintf("%s/%d/%d", r.Sandbox.ID, r.Generation, r.Sequence), "title": title(r), "desc": r.Text,
			"analytic": object{"type_id": 1, "uid": strconv.FormatUint(uint64(r.Rule), 10), "name": r.RuleText, "category": r.Policy}}
		return out
	}
	if c.class == 1007 {
		out["process"] = process
	}
	ocsfTarget(out, r)
	return out
}

func title(r Record) string {
	if r.RuleText != "" {
		return r.RuleText
	}
	return r.Verdict + " " + r.Op
}

func ocsfTarget(out object, r Record) {
	if a, err := netip.ParseAddrPort(r.Target); err == nil {
		out["dst_endpoint"] = object{"ip": a.Addr().String(), "port": a.Port()}
	}
	if r.Path != "" && r.Op != "started" {
		out["file"] = object{"path": r.Path, "name": base(r.Path), "type_id": 0}
	}
}

func base(path string) string {
	for i := len(path) - 1; i >= 0; i-- {
		if path[i] == '/' {
			return path[i+1:]
		}
	}
	return path
}

func ocsfProcess(r Record) object {
	p := object{"pid": r.Process.PID, "name": r.Process.Name, "user": object{"uid": strconv.FormatUint(uint64(r.Process.UID), 10), "type_id": 0}}
	if r.Process.Exe != "" {
		p["file"] = object{"path": r.Process.Exe, "name": base(r.Process.Exe), "type_id": 1}
	}
	if len(r.Process.Args) > 0 {
		line := ""
		for i, a := range r.Process.Args {
			if i > 0 {
				line += " "
			}
			line += a
		}
		p["cmd_line"] = line
	}
	if r.Process.Container != "" {
		p["container"] = object{"uid": r.Process.Container}
	}
	up := object(nil)
	for i := len(r.Process.Lineage) - 1; i >= 0; i-- {
		a := object{"pid": r.Process.Lineage[i].PID, "name": r.Process.Lineage[i].Name}
		if up != nil {
			a["parent_process"] = up
		}
		up = a
	}
	if up != nil {
		if r.Process.Parent != "" {
			up["file"] = object{"path": r.Process.Parent, "name": base(r.Process.Parent), "type_id": 1}
		}
		p["parent_process"] = up
	}
	return p
}

func ocsfSeverity(r Record) (int, string) {
	if r.Verdict == "allowed" {
		return 1, "Informational"
	}
	switch r.Severity {
	case spec.SeverityInfo:
		return 2, "Low"
	case spec.SeverityCritical:
		return 5, "Critical"
	}
	return 3, "Medium"
}

// otel is a request of OTLP/HTTP in JSON with one log record.
func otel(r Record) object {
	number, text := 9, "INFO"
	switch {
	case r.Verdict == "allowed":
	case r.Severity == spec.SeverityCritical:
		number, text = 17, "ERROR"
	case r.Severity != spec.SeverityInfo:
		number, text = 13, "WARN"
	}
	var resource, attributes attributes
	resource.text("service.name", r.Sandbox.Workload)
	resource.text("service.namespace", r.Sandbox.Namespace)
	resource.text("service.instance.id", r.Sandbox.ID)
	resource.text("host.name", r.Sandbox.Node)
	resource.text("container.image.name", r.Sandbox.Image)
	resource.text("container.image.id", r.Sandbox.ImageDigest)
	resource.text("hauberk.application", r.Sandbox.Application)
	attributes.text("event.name", "hauberk.guard."+r.Op)
	attributes.text("hauberk.guard.verdict", r.Verdict)
	attributes.text("hauberk.guard.policy", r.Policy)
	attributes.text("hauberk.guard.rule.text", r.RuleText)
	attributes.number("hauberk.guard.rule", uint64(r.Rule))
	attributes.number("hauberk.guard.generation", r.Generation)
	attributes.number("hauberk.guard.count", r.Count)
	attributes.number("hauberk.guard.sequence", r.Sequence)
	attributes.number("hauberk.guard.lost", r.Lost)
	attributes.number("process.pid", uint64(r.Process.PID))
	attributes.number("process.parent_pid", uint64(r.Process.PPID))
	attributes.text("process.executable.path", r.Process.Exe)
	attributes.text("process.title", r.Process.Name)
	attributes.list("process.command_args", r.Process.Args)
	attributes.text("container.id", r.Process.Container)
	attributes.text("file.path", r.Path)
	if a, err := netip.ParseAddrPort(r.Target); err == nil {
		attributes.text("network.peer.address", a.Addr().String())
		attributes.number("network.peer.port", uint64(a.Port()))
	}
	at := strconv.FormatInt(r.Time.UnixNano(), 10)
	return object{"resourceLogs": []object{{
		"resource": object{"attributes": resource},
		"scopeLogs": []object{{"scope": object{"name": "hauberk.dev/guard", "version": Schema},
			"logRecords": []object{{"timeUnixNano": at, "observedTimeUnixNano": at, "severityNumber": number, "severityText": text,
				"body": object{"stringValue": r.Text}, "attributes": attributes}}}},
	}}}
}

// attributes of OTLP; those without a value are left out.
type attributes []object

func (a *attributes) text(key, value string) {
	if value != "" {
		*a = append(*a, object{"key": key, "value": object{"stringValue": value}})
	}
}

func (a *attributes) number(key string, value uint64) {
	if value != 0 {
		*a = append(*a, object{"key": key, "value": object{"intValue": strconv.FormatUint(value, 10)}})
	}
}

func (a *attributes) list(key string, values []string) {
	if len(values) == 0 {
		return
	}
	list := make([]object, 0, len(values))
	for _, v := range values {
		list = append(list, object{"stringValue": v})
	}
	*a = append(*a, object{"key": key, "value": object{"arrayValue": object{"values": list}}})
}

// Since reads a time, or how long ago it was.
func Since(text string, now time.Time) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	if ago, err := time.ParseDuration(text); err == nil {
		return now.Add(-ago), nil
	}
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return at, fmt.Errorf("since %q: want a time such as 2026-11-22T10:00:00Z, or a while such as 10m", text)
	}
	return at, nil
}
