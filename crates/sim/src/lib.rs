//! Scheduling experiments on traces: the same arrivals under several policies.

pub mod openb;
