package spec

// Workload is a running part of an application.
// +kubebuilder:validation:XValidation:rule="!has(self.ports) || self.ports.all(p, !has(p.publish) || p.publish == 0 || self.ports.exists_one(q, has(q.publish) && q.publish == p.publish))",message="two ports publish the same port of the node"
type Workload struct {
	// Application that owns the workload, in the same namespace.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	Application string `json:"application"`
	// Image is a repository with tag or digest in Hauberk's registry, such as
	// bank/web:1 or bank/web@sha256:….
	// +kubebuilder:validation:Pattern=`^[a-z0-9]+([._/-][a-z0-9]+)*(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127}|@sha256:[a-f0-9]{64})$`
	// +kubebuilder:validation:MaxLength=255
	Image string `json:"image"`
	// Command replaces the image's entry point; Args its command.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=4096
	Command []string `json:"command,omitempty"`
	// +optional
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MaxLength=32768
	Args []string `json:"args,omitempty"`
	// Env is added to the image's environment.
	// +optional
	// +kubebuilder:validation:MaxItems=256
	// +listType=map
	// +listMapKey=name
	Env []EnvVar `json:"env,omitempty"`
	// Replicas is the number of instances.
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000
	// +kubebuilder:default=1
	// +optional
	Replicas *int32 `json:"replicas,omitempty"`
	// Sandbox is the machine each instance gets.
	// +optional
	// +kubebuilder:default={class: "vm"}
	Sandbox Sandbox `json:"sandbox,omitempty"`
	// Ports the workload listens on; other workloads reach it by its name at
	// these ports.
	// +optional
	// +kubebuilder:validation:MaxItems=64
	// +listType=map
	// +listMapKey=port
	Ports []Port `json:"ports,omitempty"`
	// GuardPolicies names the GuardPolicy objects, in the same namespace, that
	// apply; all of them hold. None means the built-in baseline.
	// +optional
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=253
	// +listType=set
	GuardPolicies []string `json:"guardPolicies,omitempty"`
	// OnContain says what happens to an instance that was contained: Hold keeps
	// it frozen and starts nothing in its place; Replace starts a fresh one
	// beside it.
	// +kubebuilder:validation:Enum=Hold;Replace
	// +kubebuilder:default=Hold
	// +optional
	OnContain string `json:"onContain,omitempty"`
}

// EnvVar is one environment variable.
type EnvVar struct {
	// +kubebuilder:validation:Pattern=`^[A-Za-z_][A-Za-z0-9_]*$`
	// +kubebuilder:validation:MaxLength=256
	Name string `json:"name"`
	// +optional
	// +kubebuilder:validation:MaxLength=32768
	Value string `json:"value,omitempty"`
}

// Sandbox is the machine of an instance.
type Sandbox struct {
	// Class of isolation. "vm" is a light virtual machine with its own kernel.
	// +kubebuilder:validation:Enum=vm
	// +kubebuilder:default=vm
	// +optional
	Class string `json:"class,omitempty"`
	// MemoryMiB of the guest.
	// +kubebuilder:validation:Minimum=96
	// +kubebuilder:validation:Maximum=16384
	// +kubebuilder:default=160
	// +optional
	MemoryMiB int32 `json:"memoryMiB,omitempty"`
	// CPUs of the guest.
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=64
	// +kubebuilder:default=1
	// +optional
	CPUs int32 `json:"cpus,omitempty"`
}

// Port is a port a workload listens on.
type Port struct {
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	Port int32 `json:"port"`
	// Protocol the mesh understands on this port: it judges each request of
	// HTTP, gRPC, SOFARPC (bolt) and Dubbo, each command of Redis; tcp passes bytes.
	// +kubebuilder:validation:Enum=http;grpc;bolt;dubbo;dubbo-thrift;redis;tcp
	// +kubebuilder:default=tcp
	// +optional
	Protocol string `json:"protocol,omitempty"`
	// Publish opens the port on the node's loopback address for clients
	// without an identity; they still need an AccessPolicy that allows
	// "anonymous". 0 publishes nothing.
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=65535
	// +optional
	Publish int32 `json:"publish,omitempty"`
}
