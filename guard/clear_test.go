package guard

import "hauberk.dev/api/spec"

// clearScenarios are about what the programs remember of directories: a move, a
// link, a rule further down and another policy must each be seen at once. The
// first lets its policy find everything clear that the second denies.
func clearScenarios() []scenario {
	const denied = "may not be read"
	sealed := []spec.GuardFile{{Path: "/srv/secret", Deny: "r"}, {Path: "/srv/vault/open/closed", Deny: "rw"}}
	return []scenario{{
		name:   "clear",
		policy: spec.GuardPolicy{Files: sealed},
		attacks: []attempt{
			{"movedabove /tmp/clear/1 /srv/secret/1", denied, OpRead, "P8 B3"},
			{"movedfile /tmp/clear/2 /srv/secret/2", denied, OpRead, "P8 B3"},
			{"linkedafter /tmp/clear/3 /srv/secret/3", denied, OpRead, "P8 B3"},
			{"besides /srv/vault/open/y /srv/vault/open/closed/z", "may be neither read nor changed", OpRead, "P8"},
		},
		benign: []string{"read=90 /srv/vault/x", "read=91 /srv/vault/x", "write=90 /srv/trap/new", "write=91 /srv/trap/new"},
	}, {
		name:   "clear-no-more",
		policy: spec.GuardPolicy{Files: []spec.GuardFile{{Path: "/srv/vault", Deny: "r"}, {Path: "/srv/trap", Deny: "w"}}},
		attacks: []attempt{
			{"read=92 /srv/vault/x", denied, OpRead, "P8 B20"},
			{"write=92 /srv/trap/new", "may not be changed", OpWrite, "P8 B20"},
		},
	}}
}
