package spec

// Application says what a team owns: the source, the people, and who may do
// what with it.
type Application struct {
	// Repositories are the source repositories the application may be built
	// from, as URIs; a provenance naming any other is refused.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=1024
	// +listType=set
	Repositories []string `json:"repositories"`
	// Accounts lists the people and machines that hold a role here.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=256
	// +listType=map
	// +listMapKey=name
	Accounts []Account `json:"accounts"`
	// Tier is how much depends on the application: a tier-1 application fails
	// closed when revocations are stale.
	// +kubebuilder:validation:Enum=tier1;tier2;tier3
	// +kubebuilder:default=tier2
	// +optional
	Tier string `json:"tier,omitempty"`
}

// Account is one holder of roles on an application.
// +kubebuilder:validation:XValidation:rule="has(self.key) || !self.roles.exists(r, r in ['owner', 'reviewer', 'builder'])",message="owners, reviewers and builders sign: set key to the account's public key in PEM"
type Account struct {
	// Name is unique within the application.
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9.@]*[a-z0-9])?$`
	// +kubebuilder:validation:MaxLength=128
	Name string `json:"name"`
	// Roles the account holds.
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=8
	// +listType=set
	Roles []Role `json:"roles"`
	// Key is the account's public signing key, PEM-encoded SubjectPublicKeyInfo
	// (ECDSA P-256 or Ed25519). Needed by accounts that sign: reviewers, owners,
	// builders.
	// +optional
	// +kubebuilder:validation:MaxLength=2048
	Key string `json:"key,omitempty"`
}

// Role is something an account may do with an application.
// +kubebuilder:validation:Enum=owner;developer;reviewer;builder;deployer;debugger
type Role string

// The roles.
const (
	RoleOwner     Role = "owner"     // approves releases
	RoleDeveloper Role = "developer" // writes the code
	RoleReviewer  Role = "reviewer"  // reviews it; never their own
	RoleBuilder   Role = "builder"   // signs provenance
	RoleDeployer  Role = "deployer"  // starts and stops workloads
	RoleDebugger  Role = "debugger"  // may exec into a running workload
)
