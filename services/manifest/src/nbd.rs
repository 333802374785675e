//! Where a block server is: `nbd://ADDRESS[:PORT][/EXPORT]` or `nbd+unix:///[EXPORT]?socket=/path`, as qemu and nbdkit write them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// NBD's own.
const PORT: u16 = 10809;
/// Longest name that servers must know.
const NAME_MAX: usize = 4096;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdPlace {
    /// A Unix socket.
    Unix(PathBuf),
    /// TCP.
    Tcp(SocketAddr),
}

/// See the module head.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NbdUrl {
    /// Where.
    pub place: NbdPlace,
    /// Which of its exports; often none, which is the default one.
    pub export: String,
}

impl FromStr for NbdUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| {
            Err(format!(
                "{text:?} {why}: write nbd://192.0.2.7:10809/export, or nbd+unix:///export?socket=/run/server.sock"
            ))
        };
        let Some((scheme, rest)) = text.split_once("://") else { return wrong("names no block server") };
        let (path, query) = rest.split_once('?').map_or((rest, None), |(path, query)| (path, Some(query)));
        let (authority, name) = path.split_once('/').unwrap_or((path, ""));
        let Some(export) = decoded(name) else { return wrong("has an export with a wrong %") };
        if export.len() > NAME_MAX {
            return wrong("has a name of more than 4096 bytes");
        }
        let place = match (scheme, query) {
            ("nbd+unix", Some(query)) if authority.is_empty() => {
                let socket = query.strip_prefix("socket=").filter(|socket| !socket.contains('&')).and_then(decoded);
                match socket {
                    Some(socket) if socket.starts_with('/') => NbdPlace::Unix(socket.into()),
                    _ => return wrong("needs ?socket=/path and nothing else"),
                }
            }
            ("nbd+unix", _) => return wrong("needs three / and ?socket=/path"),
            ("nbd", None) => match address(authority) {
                Some(address) => NbdPlace::Tcp(address),
                None => return wrong("needs an address in numbers (a confined driver asks no name server)"),
            },
            ("nbd", _) => return wrong("has options, and this scheme has none"),
            ("nbds" | "nbds+unix", _) => return wrong("wants TLS, which this driver does not have (use a tunnel)"),
            _ => return wrong("has a scheme that is not known"),
        };
        Ok(Self { place, export })
    }
}

fn address(text: &str) -> Option<SocketAddr> {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, port.parse().ok()?),
        _ => (text, PORT),
    };
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let ip = if host == "localhost" { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { host.parse().ok()? };
    Some(SocketAddr::new(ip, port))
}

fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                (digit()? * 16 + digit()?) as u8
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-_.~:,@+".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

impl fmt::Display for NbdUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = encoded(&self.export);
        match &self.place {
            NbdPlace::Unix(path) => write!(f, "nbd+unix:///{export}?socket={}", encoded(&path.to_string_lossy())),
            NbdPlace::Tcp(address) if export.is_empty() => write!(f, "nbd://{address}"),
            NbdPlace::Tcp(address) => write!(f, "nbd://{address}/{export}"),
        }
    }
}

impl TryFrom<String> for NbdUrl {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<NbdUrl> for String {
    fn from(url: NbdUrl) -> Self {
        url.to_string()
    }
}

/// `url`: one, or one for each replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Urls {
    /// `url = "nbd://..."`
    One(String),
    /// `url = ["nbd://...", "nbd://..."]`
    Many(Vec<String>),
}

impl Urls {
    /// All of them.
    ///
    /// # Errors
    /// What is wrong with one.
    pub fn parsed(&self) -> Result<Vec<NbdUrl>, String> {
        match self {
            Self::One(one) => Ok(vec![one.parse()?]),
            Self::Many(many) => many.iter().map(|one| one.parse()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_what_they_say_and_come_back_the_same() {
        let unix = |path: &str, export: &str| NbdUrl { place: NbdPlace::Unix(path.into()), export: export.into() };
        let tcp =
            |text: &str, export: &str| NbdUrl { place: NbdPlace::Tcp(text.parse().unwrap()), export: export.into() };
        let all = [
            ("nbd+unix:///?socket=/run/a.sock", unix("/run/a.sock", "")),
            ("nbd+unix:///far%200?socket=/run/a%26b", unix("/run/a&b", "far 0")),
            ("nbd://192.0.2.7", tcp("192.0.2.7:10809", "")),
            ("nbd://192.0.2.7:99/pool/image", tcp("192.0.2.7:99", "pool/image")),
            ("nbd://[2001:db8::1]/x", tcp("[2001:db8::1]:10809", "x")),
            ("nbd://[2001:db8::1]:7", tcp("[2001:db8::1]:7", "")),
            ("nbd://localhost/x", tcp("127.0.0.1:10809", "x")),
        ];
        for (text, expected) in all {
            let url: NbdUrl = text.parse().unwrap();
            assert_eq!(url, expected, "{text}");
            assert_eq!(url.to_string().parse(), Ok(url), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_url_is_said() {
        let all = [
            ("far0", "names no block server"),
            ("http://192.0.2.7", "not known"),
            ("nbds://192.0.2.7", "TLS"),
            ("nbd://server.example/x", "numbers"),
            ("nbd://192.0.2.7:x", "numbers"),
            ("nbd://192.0.2.7?socket=/a", "has options"),
            ("nbd+unix://?socket", "?socket=/path"),
            ("nbd+unix:///x?socket=a", "?socket=/path"),
            ("nbd+unix:///x?socket=/a&b=c", "?socket=/path"),
            ("nbd+unix:///%4?socket=/a", "wrong %"),
            ("nbd+unix:///x", "?socket=/path"),
        ];
        for (text, said) in all {
            let error = text.parse::<NbdUrl>().unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
