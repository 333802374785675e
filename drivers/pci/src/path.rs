//! How the manifest names a PCI device.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::PciError;

/// Domain, bus, device, function: `0000:00:05.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PciAddress {
    /// PCI segment.
    pub domain: u16,
    /// Bus.
    pub bus: u8,
    /// Device, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl FromStr for PciAddress {
    type Err = PciError;

    fn from_str(text: &str) -> Result<Self, PciError> {
        let parsed = || {
            let (domain, rest) = text.split_once(':')?;
            let (bus, rest) = rest.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            let number = |part: &str, digits: usize| {
                let legal = part.len() == digits && part.bytes().all(|c| c.is_ascii_hexdigit());
                legal.then(|| u16::from_str_radix(part, 16).ok()).flatten()
            };
            let [domain, bus] = [number(domain, 4)?, number(bus, 2)?];
            let [device, function] = [number(device, 2)?, number(function, 1)?];
            let legal = device < 32 && function < 8;
            legal.then_some(Self { domain, bus: bus as u8, device: device as u8, function: function as u8 })
        };
        parsed().ok_or_else(|| PciError::Path { text: text.to_owned() })
    }
}

/// `pci = "0000:00:05.0"` (VFIO), or `pci = "vfio-user:/run/model.sock"` (a device in another process). Manifest and plan hold it as this text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum PciPath {
    /// A device of this machine that is bound to vfio-pci.
    Vfio(PciAddress),
    /// The socket of a process that plays a device.
    VfioUser(PathBuf),
}

impl FromStr for PciPath {
    type Err = PciError;

    fn from_str(text: &str) -> Result<Self, PciError> {
        match text.strip_prefix("vfio-user:") {
            Some(path) if path.starts_with('/') => Ok(Self::VfioUser(path.into())),
            Some(_) => Err(PciError::Path { text: text.to_owned() }),
            None => text.parse().map(Self::Vfio),
        }
    }
}

impl TryFrom<String> for PciPath {
    type Error = PciError;

    fn try_from(text: String) -> Result<Self, PciError> {
        text.parse()
    }
}

impl From<PciPath> for String {
    fn from(path: PciPath) -> Self {
        path.to_string()
    }
}

impl fmt::Display for PciPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vfio(address) => address.fmt(f),
            Self::VfioUser(path) => write!(f, "vfio-user:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_sockets_are_read_as_they_are_written() {
        for text in ["0000:00:05.0", "0001:af:1f.7", "vfio-user:/run/a.sock"] {
            assert_eq!(text.parse::<PciPath>().map(|path| path.to_string()).ok().as_deref(), Some(text));
        }
    }

    #[test]
    fn anything_else_is_refused_with_an_example() {
        for text in [
            "",
            "00:05.0",
            "0000:00:05",
            "0000:00:20.0",
            "0000:00:05.8",
            "0000:0:05.0",
            "vfio-user:a.sock",
            "+000:00:05.0",
        ] {
            let error = text.parse::<PciPath>().map_err(|error| error.to_string());
            assert!(error.is_err_and(|error| error.contains("0000:00:05.0")), "{text}");
        }
    }
}
