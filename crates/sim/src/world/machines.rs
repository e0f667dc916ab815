//! The machines as they are: what is broken, who holds what, and how much is free.

use std::collections::HashMap;

use drumline_cluster::{Health, Node};
use drumline_spec::{DeviceKind, WHOLE_DEVICE};
use drumline_types::{DeviceId, NodeName};

const WHOLE: u64 = WHOLE_DEVICE as u64;

/// One device of one machine, by place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) node: u32,
    pub(super) device: u32,
}

#[derive(Debug)]
struct Machine {
    node: Node,
    /// Thousandths held of each device.
    held: Vec<u64>,
    /// The same over all counted devices.
    held_sum: u64,
    /// Starts on it, once for each device.
    holders: Vec<(u32, u32)>,
    down: bool,
}

/// All machines.
#[derive(Debug)]
pub(super) struct Machines {
    counted: DeviceKind,
    machines: Vec<Machine>,
    /// Only ever asked for a name, never walked over.
    places: HashMap<NodeName, u32>,
    capacity: u64,
    held: u64,
    broken: u64,
    untouched: u64,
}

impl Machines {
    pub(super) fn new(nodes: &[Node], counted: DeviceKind) -> Self {
        let machines: Vec<Machine> = nodes
            .iter()
            .map(|node| Machine {
                held: vec![0; node.devices.len()],
                held_sum: 0,
                holders: Vec::new(),
                down: !node.ready,
                node: node.clone(),
            })
            .collect();
        let places = (0..).zip(nodes).map(|(at, node)| (node.name.clone(), at)).collect();
        let (capacity, held) = (0, 0);
        let (broken, untouched) = (0, 0);
        let mut all = Self { counted, machines, places, capacity, held, broken, untouched };
        for at in 0..all.machines.len() {
            let machine = &all.machines[at];
            let kind = |device: &&drumline_cluster::Device| device.kind == counted;
            all.capacity += machine.node.devices.iter().filter(kind).count() as u64 * WHOLE;
            let (broken, untouched) = all.standing(at);
            all.broken += broken;
            all.untouched += untouched;
        }
        all
    }

    /// Returns what of a machine is broken and not held, and what is free if it holds nothing.
    fn standing(&self, at: usize) -> (u64, u64) {
        let machine = &self.machines[at];
        let (mut broken, mut free) = (0, 0);
        for (device, held) in machine.node.devices.iter().zip(&machine.held) {
            if device.kind == self.counted {
                if machine.down || device.health != Health::Healthy {
                    broken += WHOLE - held;
                } else {
                    free += WHOLE - held;
                }
            }
        }
        (broken, if machine.held_sum == 0 { free } else { 0 })
    }

    /// Changes one machine, and keeps the sums.
    fn change(&mut self, at: u32, change: impl FnOnce(&mut Machine)) {
        let at = at as usize;
        if at >= self.machines.len() {
            return;
        }
        let before = self.standing(at);
        change(&mut self.machines[at]);
        let after = self.standing(at);
        self.broken = self.broken + after.0 - before.0;
        self.untouched = self.untouched + after.1 - before.1;
    }

    pub(super) fn len(&self) -> usize {
        self.machines.len()
    }

    pub(super) fn capacity(&self) -> u64 {
        self.capacity
    }

    pub(super) fn broken(&self) -> u64 {
        self.broken
    }

    pub(super) fn untouched(&self) -> u64 {
        self.untouched
    }

    pub(super) fn idle(&self) -> u64 {
        self.capacity.saturating_sub(self.held + self.broken)
    }

    pub(super) fn is_down(&self, node: u32) -> bool {
        self.machines.get(node as usize).is_some_and(|machine| machine.down)
    }

    pub(super) fn devices(&self, node: u32) -> u32 {
        self.machines.get(node as usize).map_or(0, |machine| machine.node.devices.len() as u32)
    }

    pub(super) fn is_counted(&self, place: Place) -> bool {
        let machine = self.machines.get(place.node as usize);
        let device = machine.and_then(|machine| machine.node.devices.get(place.device as usize));
        device.is_some_and(|device| device.kind == self.counted)
    }

    /// Returns the place of a device; `None` for one that was never there.
    pub(super) fn find(&self, device: &DeviceId) -> Option<Place> {
        let node = *self.places.get(&device.node)?;
        (device.index < self.devices(node)).then_some(Place { node, device: device.index })
    }

    /// Gives devices to a start, `milli` thousandths of each, or takes them back.
    pub(super) fn hold(&mut self, slot: u32, places: &[Place], milli: u64, given: bool) {
        // Neighbouring ranks are on one machine: it is changed once.
        for run in places.chunk_by(|a, b| a.node == b.node) {
            let Some(first) = run.first() else { continue };
            let counted = self.counted;
            let mut sum = 0;
            self.change(first.node, |machine| {
                for place in run {
                    let device = place.device as usize;
                    let Some(held) = machine.held.get_mut(device) else { continue };
                    let kind = machine.node.devices.get(device).map(|device| device.kind);
                    let amount = if kind == Some(counted) { milli } else { 0 };
                    sum += amount;
                    if given {
                        *held += milli;
                        machine.held_sum += amount;
                        machine.holders.push((slot, place.device));
                    } else {
                        *held -= milli.min(*held);
                        machine.held_sum -= amount.min(machine.held_sum);
                        let at = machine.holders.iter().position(|h| *h == (slot, place.device));
                        if let Some(at) = at {
                            machine.holders.swap_remove(at);
                        }
                    }
                }
            });
            self.held = if given { self.held + sum } else { self.held.saturating_sub(sum) };
        }
    }

    /// Returns who holds something of a machine, or of one of its devices, each once.
    pub(super) fn holders(&self, node: u32, device: Option<u32>) -> Vec<u32> {
        let Some(machine) = self.machines.get(node as usize) else { return Vec::new() };
        let mut slots: Vec<u32> = machine
            .holders
            .iter()
            .filter(|(_, held)| device.is_none_or(|device| device == *held))
            .map(|(slot, _)| *slot)
            .collect();
        slots.sort_unstable();
        slots.dedup();
        slots
    }

    /// Breaks a machine or mends it, and returns what there is to tell about it.
    pub(super) fn set_down(&mut self, node: u32, down: bool) -> Option<Node> {
        self.change(node, |machine| {
            machine.down = down;
            machine.node.ready = !down;
        });
        self.machines.get(node as usize).map(|machine| machine.node.clone())
    }

    /// Breaks a device or mends it, and returns what there is to tell about its machine. `None`
    /// when it is so already.
    pub(super) fn set_health(&mut self, place: Place, health: Health) -> Option<Node> {
        let machine = self.machines.get(place.node as usize)?;
        if machine.node.devices.get(place.device as usize)?.health == health {
            return None;
        }
        self.change(place.node, |machine| {
            if let Some(device) = machine.node.devices.get_mut(place.device as usize) {
                device.health = health;
            }
        });
        self.machines.get(place.node as usize).map(|machine| machine.node.clone())
    }

    /// Returns how many machines and devices are broken now.
    pub(super) fn is_whole(&self) -> bool {
        self.machines.iter().all(|machine| {
            !machine.down && machine.node.devices.iter().all(|d| d.health == Health::Healthy)
        })
    }
}
