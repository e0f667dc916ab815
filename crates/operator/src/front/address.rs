//! How a cluster is named on the command line: `kube://CONTEXT/NAMESPACE`.

use std::fmt;

/// The start of every such address.
pub const SCHEME: &str = "kube://";

/// A context of the kubeconfig and a namespace; `None`: those that are current there.
///
/// What stands after the last slash is the namespace, since contexts may hold slashes themselves.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Address {
    /// The kubeconfig's context.
    pub context: Option<String>,
    /// The namespace of jobs that name none.
    pub namespace: Option<String>,
}

impl Address {
    /// Reads an address; `None`: it does not start as one.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix(SCHEME)?;
        let (context, namespace) = rest.rsplit_once('/').unwrap_or((rest, ""));
        let given = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        Some(Self { context: given(context), namespace: given(namespace) })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(SCHEME)?;
        f.write_str(self.context.as_deref().unwrap_or_default())?;
        match &self.namespace {
            Some(namespace) => write!(f, "/{namespace}"),
            // Without the slash, the end of such a context would be read as a namespace.
            None if self.context.as_ref().is_some_and(|name| name.contains('/')) => {
                f.write_str("/")
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_context_and_a_namespace() {
        let of = |context: Option<&str>, namespace: Option<&str>| Address {
            context: context.map(str::to_owned),
            namespace: namespace.map(str::to_owned),
        };
        for (text, address) in [
            ("kube://", of(None, None)),
            ("kube://prod", of(Some("prod"), None)),
            ("kube://prod/team", of(Some("prod"), Some("team"))),
            ("kube:///team", of(None, Some("team"))),
            ("kube://arn:aws:eks:x:1:cluster/big/", of(Some("arn:aws:eks:x:1:cluster/big"), None)),
        ] {
            assert_eq!(Address::parse(text).as_ref(), Some(&address), "{text}");
            assert_eq!(address.to_string(), text);
        }
        assert_eq!(Address::parse("http://127.0.0.1:7070"), None);
    }
}
