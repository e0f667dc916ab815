//! The operator against a real API server: etcd and kube-apiserver on loopback, with certificates
//! and RBAC, built by `tests/kube/build`. Without them each test says so and passes.
//!
//! Tier 1 (most files) has no kubelets, tier 2 (`scale`) has kwok's, tier 3 (`real`) has a real one.

mod admission;
mod chart;
mod claims;
mod cluster;
mod containers;
mod crds;
mod devices;
mod faults;
mod front;
mod gangs;
mod guard;
mod host;
mod killed;
mod kubelet;
mod kwok;
mod mixed;
mod native;
mod operator;
mod packaging;
mod preemption;
mod proxy;
mod real;
mod replicas;
mod scale;
mod trained;
mod witness;
