//! The bearer token, on both sides of a gRPC call. Its value is never formatted.

use std::fmt;
use std::sync::Arc;

use subtle::ConstantTimeEq;
use tonic::metadata::Ascii;
use tonic::metadata::MetadataValue;
use tonic::service::Interceptor;
use tonic::{Request, Status};

/// A secret token. `Debug` shows no part of it.
#[derive(Clone)]
pub struct Token(Arc<str>);

/// The token holds characters that no header can carry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a token is 16 to 4096 visible ASCII characters")]
pub struct TokenError;

impl Token {
    /// Takes a token's text.
    ///
    /// # Errors
    /// [`TokenError`] when it is too short, too long, or not visible ASCII.
    pub fn new(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        let visible = text.bytes().all(|b| b.is_ascii_graphic());
        if visible && (16..=4096).contains(&text.len()) {
            Ok(Self(text.into()))
        } else {
            Err(TokenError)
        }
    }

    /// Returns the token's text, to be written to its file or sent; never to a log.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Compares in a time that does not depend on where the texts differ.
    #[must_use]
    pub fn matches(&self, presented: &str) -> bool {
        self.0.as_bytes().ct_eq(presented.as_bytes()).into()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// Adds the token to every call of a client.
#[derive(Debug, Clone)]
pub struct AddToken(MetadataValue<Ascii>);

impl AddToken {
    /// Prepares the header.
    ///
    /// # Panics
    /// Never: a [`Token`] is visible ASCII.
    #[must_use]
    pub fn new(token: &Token) -> Self {
        let mut value: MetadataValue<Ascii> =
            format!("Bearer {}", token.expose()).parse().expect("a token is visible ASCII");
        value.set_sensitive(true);
        Self(value)
    }
}

impl Interceptor for AddToken {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}

/// Refuses every call of a server that does not carry the token, or one of two.
#[derive(Debug, Clone)]
pub struct RequireToken {
    token: Token,
    other: Option<Token>,
}

impl RequireToken {
    /// Requires `token`.
    #[must_use]
    pub fn new(token: Token) -> Self {
        Self { token, other: None }
    }

    /// Lets `other` do as well, if there is one.
    #[must_use]
    pub fn or(self, other: Option<Token>) -> Self {
        Self { other, ..self }
    }

    fn matches(&self, presented: &str) -> bool {
        // Both are looked at, so that the time tells nothing of which.
        let other = self.other.as_ref().is_some_and(|other| other.matches(presented));
        self.token.matches(presented) | other
    }
}

impl Interceptor for RequireToken {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        match bearer(&request) {
            Some(presented) if self.matches(presented) => Ok(request),
            Some(_) => Err(Status::unauthenticated("the token is not valid for this cluster")),
            None => Err(Status::unauthenticated(
                "no token: send `authorization: Bearer TOKEN`; it is in the state folder's file `token`",
            )),
        }
    }
}

/// Returns the bearer token that a request presents.
pub fn bearer<T>(request: &Request<T>) -> Option<&str> {
    request.metadata().get("authorization")?.to_str().ok()?.strip_prefix("Bearer ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_token_passes() {
        let token = Token::new("0123456789abcdef").unwrap();
        let mut gate = RequireToken::new(token.clone());
        assert!(gate.call(Request::new(())).is_err());
        let other = Token::new("0123456789abcdeX").unwrap();
        let wrong = AddToken::new(&other).call(Request::new(())).unwrap();
        assert!(gate.call(wrong).is_err());
        let right = || AddToken::new(&token).call(Request::new(())).unwrap();
        assert!(gate.call(right()).is_ok());
        let mut gate = RequireToken::new(other.clone()).or(Some(token.clone()));
        assert!(gate.call(right()).is_ok());
        assert!(gate.call(AddToken::new(&other).call(Request::new(())).unwrap()).is_ok());
        assert!(gate.call(Request::new(())).is_err());
    }

    #[test]
    fn a_token_is_never_shown() {
        let token = Token::new("0123456789abcdef").unwrap();
        assert!(!format!("{token:?} {:?}", AddToken::new(&token)).contains("0123456789abcdef"));
        assert!(Token::new("short").is_err());
        assert!(Token::new("with space in the middle").is_err());
    }
}
