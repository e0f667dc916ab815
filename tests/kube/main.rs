//! The operator against a real API server: etcd and kube-apiserver on loopback, with certificates
//! and RBAC, built by `tests/kube/build`. Without them each test says so and passes.

mod admission;
mod chart;
mod cluster;
mod containers;
mod crds;
mod faults;
mod gangs;
mod killed;
mod kubelet;
mod native;
mod operator;
mod preemption;
mod proxy;
