//! What every HTTP listener of Drumline does alike: who may call, from where, and how it says no.
//!
//! Host and Origin are checked on every method, so that a web page on another site can neither
//! read nor change anything, not even by re-binding a name to the loopback address.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, COOKIE, HOST, ORIGIN, RETRY_AFTER};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use drumline_wire::auth::Token;

/// Which hosts and origins a listener answers to.
#[derive(Debug, Clone)]
pub struct Guard {
    hosts: Arc<BTreeSet<String>>,
}

impl Guard {
    /// Allows the names of the address that a listener is bound to, and `more` names, given as
    /// `HOST` or `HOST:PORT`.
    #[must_use]
    pub fn new(bound: SocketAddr, more: &[String]) -> Self {
        let port = bound.port();
        let mut names: Vec<String> = more.to_vec();
        if bound.ip().is_loopback() || bound.ip().is_unspecified() {
            names.extend(["localhost", "127.0.0.1", "[::1]"].map(str::to_owned));
        }
        names.push(match bound.ip() {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => format!("[{ip}]"),
        });
        let mut hosts = BTreeSet::new();
        for name in names {
            let bare = port == 80 || more.contains(&name);
            let name = name.to_ascii_lowercase();
            hosts.insert(format!("{name}:{port}"));
            if bare {
                hosts.insert(name);
            }
        }
        Self { hosts: Arc::new(hosts) }
    }

    /// Checks a request's Host, and its Origin where it has one.
    ///
    /// # Errors
    /// What is wrong, in one line.
    pub fn check(&self, headers: &HeaderMap, uri_host: Option<&str>) -> Result<(), String> {
        let host = headers.get(HOST).and_then(|host| host.to_str().ok()).or(uri_host);
        let host = host.ok_or("the request names no Host")?.to_ascii_lowercase();
        if !self.hosts.contains(&host) {
            return Err(format!("Host {host:?} is not served here; name it with --allow-host"));
        }
        let Some(origin) = headers.get(ORIGIN) else {
            return Ok(());
        };
        let origin = origin.to_str().unwrap_or("").to_ascii_lowercase();
        let site = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        if site.is_some_and(|site| self.hosts.contains(site)) {
            Ok(())
        } else {
            Err(format!("Origin {origin:?} may not call this address"))
        }
    }
}

/// Refuses a request whose Host or Origin is not allowed; for `middleware::from_fn_with_state`.
pub async fn guard(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    let uri_host = request.uri().authority().map(|authority| authority.as_str().to_owned());
    match guard.check(request.headers(), uri_host.as_deref()) {
        Ok(()) => harden(next.run(request).await),
        Err(reason) => (StatusCode::FORBIDDEN, format!("{reason}\n")).into_response(),
    }
}

/// Adds the headers that keep a browser from doing more with a page than it should.
fn harden(mut response: Response) -> Response {
    let policy = "default-src 'none'; style-src 'self' 'unsafe-inline'; script-src 'self'; \
                  img-src 'self' data:; connect-src 'self'; form-action 'self'; \
                  frame-ancestors 'none'; base-uri 'none'";
    for (name, value) in [
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("content-security-policy", policy),
    ] {
        response.headers_mut().entry(name).or_insert(HeaderValue::from_static(value));
    }
    response
}

/// Any of these tokens opens the door.
#[derive(Debug, Clone)]
pub struct Keys(Arc<[Token]>);

impl Keys {
    /// Takes the tokens that are valid.
    #[must_use]
    pub fn new(tokens: Vec<Token>) -> Self {
        Self(tokens.into())
    }

    /// Returns whether the request carries a valid token: in `Authorization: Bearer`, or in the
    /// cookie named `cookie`.
    #[must_use]
    pub fn admit(&self, headers: &HeaderMap, cookie: Option<&str>) -> bool {
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let bearer = text(AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer "));
        let from_cookie = cookie.and_then(|name| {
            text(COOKIE)?.split(';').find_map(|pair| {
                let (key, value) = pair.trim().split_once('=')?;
                (key == name).then_some(value)
            })
        });
        // All are compared, so that the time does not tell which one was close.
        bearer.into_iter().chain(from_cookie).fold(false, |open, presented| {
            self.0.iter().fold(open, |open, token| open | token.matches(presented))
        })
    }
}

/// Why a listener may not be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "refusing to listen on {address}: there is no TLS yet, so only loopback addresses are served; \
     forward the port over SSH instead"
)]
pub struct PlainTextRefused {
    /// The address asked for.
    pub address: SocketAddr,
}

/// Lets a listener without TLS open on loopback only.
///
/// # Errors
/// [`PlainTextRefused`] for every other address.
pub fn plain_text_allowed(address: SocketAddr) -> Result<(), PlainTextRefused> {
    if address.ip().is_loopback() { Ok(()) } else { Err(PlainTextRefused { address }) }
}

/// Adds `Retry-After` to a response.
#[must_use]
pub fn retry_after(mut response: Response, seconds: u64) -> Response {
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| {
                (axum::http::HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
            })
            .collect()
    }

    #[test]
    fn only_own_names_and_origins_pass() {
        let guard = Guard::new("127.0.0.1:8080".parse().unwrap(), &["gpu.example".to_owned()]);
        let check = |pairs: &[(&'static str, &str)]| guard.check(&headers(pairs), None).is_ok();
        assert!(check(&[("host", "127.0.0.1:8080")]));
        assert!(check(&[("host", "LOCALHOST:8080")]));
        assert!(check(&[("host", "gpu.example")]));
        assert!(check(&[("host", "localhost:8080"), ("origin", "http://localhost:8080")]));
        assert!(!check(&[]), "no host");
        assert!(!check(&[("host", "127.0.0.1:9090")]), "another port");
        assert!(!check(&[("host", "evil.example")]), "a re-bound name");
        assert!(!check(&[("host", "localhost:8080"), ("origin", "http://evil.example")]));
        assert!(!check(&[("host", "localhost:8080"), ("origin", "null")]));
    }

    #[test]
    fn a_key_opens_by_header_or_cookie() {
        let keys = Keys::new(vec![Token::new("0123456789abcdef").unwrap()]);
        assert!(keys.admit(&headers(&[("authorization", "Bearer 0123456789abcdef")]), None));
        let cookie = headers(&[("cookie", "a=b; drumline=0123456789abcdef")]);
        assert!(keys.admit(&cookie, Some("drumline")));
        assert!(!keys.admit(&cookie, None));
        assert!(!keys.admit(&headers(&[("authorization", "Bearer nope")]), None));
        assert!(!keys.admit(&HeaderMap::new(), Some("drumline")));
    }

    #[test]
    fn plain_text_stays_on_loopback() {
        assert!(plain_text_allowed("127.0.0.1:0".parse().unwrap()).is_ok());
        assert!(plain_text_allowed("[::1]:0".parse().unwrap()).is_ok());
        assert!(plain_text_allowed("0.0.0.0:80".parse().unwrap()).is_err());
    }
}
