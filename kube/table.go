package kube

import (
	"context"
	"strconv"
	"strings"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metatable "k8s.io/apimachinery/pkg/api/meta/table"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// table is what kubectl get prints of a kind.
type table []column

type column struct {
	name string
	cell func(runtime.Object) any
}

var (
	nameColumn = column{"Name", func(o runtime.Object) any {
		m, _ := meta.Accessor(o)
		return m.GetName()
	}}
	ageColumn = column{"Age", func(o runtime.Object) any {
		m, _ := meta.Accessor(o)
		return metatable.ConvertToHumanReadableDateType(m.GetCreationTimestamp())
	}}

	nameTable      = table{nameColumn, ageColumn}
	namespaceTable = table{nameColumn, {"Status", func(o runtime.Object) any { return string(o.(*corev1.Namespace).Status.Phase) }}, ageColumn}
	configMapTable = table{nameColumn, {"Data", func(o runtime.Object) any {
		c := o.(*corev1.ConfigMap)
		return int64(len(c.Data) + len(c.BinaryData))
	}}, ageColumn}
	secretTable = table{nameColumn, {"Type", func(o runtime.Object) any { return string(o.(*corev1.Secret).Type) }},
		{"Data", func(o runtime.Object) any { return int64(len(o.(*corev1.Secret).Data)) }}, ageColumn}
	leaseTable = table{nameColumn, {"Holder", func(o runtime.Object) any {
		if h := o.(*coordinationv1.Lease).Spec.HolderIdentity; h != nil {
			return *h
		}
		return ""
	}}, ageColumn}
	eventTable = table{
		{"Last Seen", func(o runtime.Object) any { return lastSeen(o.(*corev1.Event)) }},
		{"Type", func(o runtime.Object) any { return o.(*corev1.Event).Type }},
		{"Reason", func(o runtime.Object) any { return o.(*corev1.Event).Reason }},
		{"Object", func(o runtime.Object) any {
			of := o.(*corev1.Event).InvolvedObject
			return strings.ToLower(of.Kind) + "/" + of.Name
		}},
		{"Message", func(o runtime.Object) any { return strings.TrimSpace(o.(*corev1.Event).Message) }},
	}
)

// lastSeen says how long ago an event last happened, and how often.
func lastSeen(e *corev1.Event) string {
	at, count := e.LastTimestamp.Time, e.Count
	if e.Series != nil {
		at, count = e.Series.LastObservedTime.Time, e.Series.Count
	}
	if at.IsZero() {
		at = e.EventTime.Time
	}
	since := metatable.ConvertToHumanReadableDateType(metav1.Time{Time: at.Truncate(time.Second)})
	if count > 1 {
		since += " (x" + strconv.Itoa(int(count)) + ")"
	}
	return since
}

// ConvertToTable implements rest.TableConvertor.
func (t table) ConvertToTable(_ context.Context, obj runtime.Object, options runtime.Object) (*metav1.Table, error) {
	out := &metav1.Table{}
	row := func(o runtime.Object) error {
		cells := make([]any, len(t))
		for i, c := range t {
			cells[i] = c.cell(o)
		}
		out.Rows = append(out.Rows, metav1.TableRow{Cells: cells, Object: runtime.RawExtension{Object: o}})
		return nil
	}
	if meta.IsListType(obj) {
		if err := meta.EachListItem(obj, row); err != nil {
			return nil, err
		}
		if l, err := meta.ListAccessor(obj); err == nil {
			out.ResourceVersion, out.Continue, out.RemainingItemCount = l.GetResourceVersion(), l.GetContinue(), l.GetRemainingItemCount()
		}
	} else {
		if err := row(obj); err != nil {
			return nil, err
		}
		if m, err := meta.CommonAccessor(obj); err == nil {
			out.ResourceVersion = m.GetResourceVersion()
		}
	}
	if o, ok := options.(*metav1.TableOptions); ok && o.NoHeaders {
		return out, nil
	}
	for _, c := range t {
		d := metav1.TableColumnDefinition{Name: c.name, Type: "string"}
		if c.name == "Name" {
			d.Format = "name"
		}
		if c.name == "Data" {
			d.Type = "integer"
		}
		out.ColumnDefinitions = append(out.ColumnDefinitions, d)
	}
	return out, nil
}
