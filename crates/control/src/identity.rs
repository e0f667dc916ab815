//! Ids, secrets and ports: the only place that draws random numbers.

use std::net::{IpAddr, SocketAddr, TcpListener};

use drumline_types::JobId;

/// Letters and digits that are not mistaken for each other.
const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
/// Ports for `MASTER_PORT`: below those that Linux hands out by itself.
const MASTER_PORTS: std::ops::Range<u16> = 20_000..32_000;

/// Draws a number.
///
/// # Panics
/// When the system has no random numbers to give: nothing safe can be done then.
fn random() -> u64 {
    getrandom::u64().expect("the system gives random numbers")
}

/// Returns an id for a job: its name and five random letters.
///
/// `None` when the name leaves no room, which a checked spec's never does.
pub(crate) fn job_id(name: &str) -> Option<JobId> {
    let mut bits = random();
    let suffix: String = (0..5)
        .map(|_| {
            let letter = ALPHABET[(bits % 32) as usize];
            bits /= 32;
            char::from(letter)
        })
        .collect();
    format!("{name}-{suffix}").parse().ok()
}

/// Returns the secret of an attempt: 128 random bits in hexadecimal.
pub(crate) fn secret() -> String {
    format!("{:016x}{:016x}", random(), random())
}

/// Returns a port for rank 0 to listen on at `address`, none of `taken`.
///
/// Where the address is one of this machine, the port is free now; elsewhere it is likely to be.
pub(crate) fn master_port(address: &str, taken: &[u16]) -> u16 {
    let span = u64::from(MASTER_PORTS.end - MASTER_PORTS.start);
    let draw = || MASTER_PORTS.start + (random() % span) as u16;
    let ip: Option<IpAddr> = address.parse().ok();
    for _ in 0..64 {
        let port = draw();
        let busy = ip.is_some_and(|ip| {
            let bound = TcpListener::bind(SocketAddr::from((ip, port)));
            bound.is_err_and(|error| error.kind() == std::io::ErrorKind::AddrInUse)
        });
        if !busy && !taken.contains(&port) {
            return port;
        }
    }
    draw()
}

/// Returns a hash that stays the same from version to version (FNV-1a, 64 bits).
pub(crate) fn stable_hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_keep_the_name_and_secrets_never_repeat() {
        let name = "a".repeat(50);
        let id = job_id(&name).unwrap();
        assert!(id.as_str().starts_with(&name) && id.as_str().len() == 56);
        assert_ne!(secret(), secret());
        assert_eq!(secret().len(), 32);
    }

    #[test]
    fn a_port_in_use_is_not_given() {
        let bound = MASTER_PORTS.filter_map(|port| TcpListener::bind(("127.0.0.1", port)).ok());
        let bound: Vec<TcpListener> = bound.take(300).collect();
        let held: Vec<u16> = bound.iter().map(|one| one.local_addr().unwrap().port()).collect();
        for _ in 0..200 {
            let port = master_port("127.0.0.1", &[31_999]);
            assert!(MASTER_PORTS.contains(&port) && port != 31_999 && !held.contains(&port));
        }
    }

    #[test]
    fn the_hash_is_the_published_one() {
        assert_eq!(stable_hash(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(stable_hash(b"a"), 0xaf63_dc4c_8601_ec8c);
    }
}
