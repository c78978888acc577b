package kube

import (
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/apimachinery/pkg/conversion"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
)

// eventSeconds is how long an event is kept.
const eventSeconds = 3600

// eventLabels are the fields events can be selected by, besides the metadata.
var eventLabels = []string{
	"involvedObject.kind", "involvedObject.namespace", "involvedObject.name", "involvedObject.uid",
	"involvedObject.apiVersion", "involvedObject.resourceVersion", "involvedObject.fieldPath",
	"reason", "reportingComponent", "source", "type",
}

// convertEventLabel names the fields of events.k8s.io as the core does.
func convertEventLabel(label, value string) (string, string, error) {
	names := map[string]string{
		"regarding.kind": "involvedObject.kind", "regarding.namespace": "involvedObject.namespace",
		"regarding.name": "involvedObject.name", "regarding.uid": "involvedObject.uid",
		"regarding.apiVersion": "involvedObject.apiVersion", "regarding.resourceVersion": "involvedObject.resourceVersion",
		"regarding.fieldPath": "involvedObject.fieldPath", "reportingController": "reportingComponent",
		"reason": "reason", "type": "type", "metadata.name": "metadata.name", "metadata.namespace": "metadata.namespace",
	}
	if name, ok := names[label]; ok {
		return name, value, nil
	}
	return "", "", fmt.Errorf("select by field %q: no such field of an event", label)
}

// eventAttributes is what selectors see of an event.
func eventAttributes(obj runtime.Object) (labels.Set, fields.Set, error) {
	e, ok := obj.(*corev1.Event)
	if !ok {
		return nil, nil, fmt.Errorf("read attributes: %T is no event", obj)
	}
	source := e.Source.Component
	if source == "" {
		source = e.ReportingController
	}
	o := e.InvolvedObject
	return e.Labels, fields.Set{
		"metadata.name": e.Name, "metadata.namespace": e.Namespace,
		"involvedObject.kind": o.Kind, "involvedObject.namespace": o.Namespace, "involvedObject.name": o.Name,
		"involvedObject.uid": string(o.UID), "involvedObject.apiVersion": o.APIVersion,
		"involvedObject.resourceVersion": o.ResourceVersion, "involvedObject.fieldPath": o.FieldPath,
		"reason": e.Reason, "reportingComponent": e.ReportingController, "source": source, "type": e.Type,
	}, nil
}

func addEventConversions(s *runtime.Scheme) error {
	return errors.Join(
		s.AddConversionFunc((*corev1.Event)(nil), (*eventsv1.Event)(nil), eventToEvents),
		s.AddConversionFunc((*eventsv1.Event)(nil), (*corev1.Event)(nil), eventToCore),
		s.AddConversionFunc((*corev1.EventList)(nil), (*eventsv1.EventList)(nil), func(in, out any, scope conversion.Scope) error {
			from, to := in.(*corev1.EventList), out.(*eventsv1.EventList)
			to.ListMeta, to.Items = from.ListMeta, make([]eventsv1.Event, len(from.Items))
			for i := range from.Items {
				if err := eventToEvents(&from.Items[i], &to.Items[i], scope); err != nil {
					return err
				}
			}
			return nil
		}),
		s.AddConversionFunc((*eventsv1.EventList)(nil), (*corev1.EventList)(nil), func(in, out any, scope conversion.Scope) error {
			from, to := in.(*eventsv1.EventList), out.(*corev1.EventList)
			to.ListMeta, to.Items = from.ListMeta, make([]corev1.Event, len(from.Items))
			for i := range from.Items {
				if err := eventToCore(&from.Items[i], &to.Items[i], scope); err != nil {
					return err
				}
			}
			return nil
		}),
	)
}

func eventToEvents(in, out any, _ conversion.Scope) error {
	from, to := in.(*corev1.Event), out.(*eventsv1.Event)
	*to = eventsv1.Event{
		ObjectMeta: from.ObjectMeta, EventTime: from.EventTime, ReportingController: from.ReportingController,
		ReportingInstance: from.ReportingInstance, Action: from.Action, Reason: from.Reason, Regarding: from.InvolvedObject,
		Related: from.Related, Note: from.Message, Type: from.Type, DeprecatedSource: from.Source,
		DeprecatedFirstTimestamp: from.FirstTimestamp, DeprecatedLastTimestamp: from.LastTimestamp, DeprecatedCount: from.Count,
	}
	if from.Series != nil {
		to.Series = &eventsv1.EventSeries{Count: from.Series.Count, LastObservedTime: from.Series.LastObservedTime}
	}
	return nil
}

func eventToCore(in, out any, _ conversion.Scope) error {
	from, to := in.(*eventsv1.Event), out.(*corev1.Event)
	*to = corev1.Event{
		ObjectMeta: from.ObjectMeta, EventTime: from.EventTime, ReportingController: from.ReportingController,
		ReportingInstance: from.ReportingInstance, Action: from.Action, Reason: from.Reason, InvolvedObject: from.Regarding,
		Related: from.Related, Message: from.Note, Type: from.Type, Source: from.DeprecatedSource,
		FirstTimestamp: from.DeprecatedFirstTimestamp, LastTimestamp: from.DeprecatedLastTimestamp, Count: from.DeprecatedCount,
	}
	if from.Series != nil {
		to.Series = &corev1.EventSeries{Count: from.Series.Count, LastObservedTime: from.Series.LastObservedTime}
	}
	return nil
}
