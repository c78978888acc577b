// Package trail makes of the Guard's events what people and their tools read:
// records with a stable schema, free of secrets, kept in bounded files and
// given out as JSON lines, OCSF or OpenTelemetry logs; and counts of them.
//
// A record's texts are the workload's own words and are shown escaped. What
// a record says of the sandbox is the host's word.
package trail
