//! `uhmm up --file SIZE[:PATH]` and `uhmm up --nbd URL SIZE`: far memory from two words.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Context;
use uhmm_manifest::{ByteSize, Manifest, NbdUrl};

/// How much, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FarFile {
    size: ByteSize,
    path: Option<PathBuf>,
}

impl FarFile {
    /// How much.
    pub fn size(&self) -> ByteSize {
        self.size
    }

    /// Where, if that was said.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }
}

impl FromStr for FarFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (size, path) = text.split_once(':').map_or((text, None), |(size, path)| (size, Some(PathBuf::from(path))));
        if path.as_ref().is_some_and(|path| path.as_os_str().is_empty()) {
            return Err(format!("{text:?} names no path behind the colon: write 64GiB or 64GiB:/var/lib/uhmm/far0"));
        }
        Ok(Self { size: size.parse()?, path })
    }
}

/// Where it is when nobody says: what an account keeps beyond a reboot. `var`: the environment.
fn usual_path(root: bool, var: impl Fn(&str) -> Option<PathBuf>) -> anyhow::Result<PathBuf> {
    if root {
        return Ok("/var/lib/uhmm/far0".into());
    }
    let absolute = |name: &str| var(name).filter(|path| path.is_absolute());
    let state = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")));
    Ok(state
        .context("This account has no $HOME: say where the file shall be, as in --file 64GiB:/data/far0")?
        .join("uhmm/far0"))
}

/// The manifest of `uhmm up`. `nbd`: url and size.
pub fn manifest_or_far(path: Option<&Path>, file: Option<FarFile>, nbd: Option<&[String]>) -> anyhow::Result<Manifest> {
    if let Some([url, size]) = nbd {
        let url: NbdUrl = url.parse().map_err(anyhow::Error::msg)?;
        return Ok(Manifest::remote_memory(size.parse().map_err(anyhow::Error::msg)?, &url));
    }
    let Some(FarFile { size, path }) = file else { return super::manifest(path) };
    let path = match path {
        Some(path) => std::path::absolute(path)?,
        None => {
            let path =
                usual_path(rustix::process::geteuid().is_root(), |name| std::env::var_os(name).map(PathBuf::from))?;
            let folder = path.parent().context("A path has a folder")?;
            // What lies there was memory: nobody else's business.
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
            made.with_context(|| {
                format!(
                    "{} cannot be made: say where the file shall be, as in --file 64GiB:/data/far0",
                    folder.display()
                )
            })?;
            path
        }
    };
    Ok(Manifest::far_memory(size, &path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_and_perhaps_a_path() {
        let parse = FarFile::from_str;
        assert_eq!(parse("64MiB"), Ok(FarFile { size: ByteSize(64 << 20), path: None }));
        assert_eq!(parse("1GiB:/a/b:c"), Ok(FarFile { size: ByteSize(1 << 30), path: Some("/a/b:c".into()) }));
        for wrong in ["", "64", "x", "64MB", "1GiB:"] {
            assert!(parse(wrong).is_err() || wrong == "64", "{wrong}");
        }
    }

    #[test]
    fn the_usual_place() {
        let environment = |name: &str| match name {
            "HOME" => Some(PathBuf::from("/home/me")),
            _ => None,
        };
        assert_eq!(usual_path(true, environment).unwrap(), Path::new("/var/lib/uhmm/far0"));
        assert_eq!(usual_path(false, environment).unwrap(), Path::new("/home/me/.local/state/uhmm/far0"));
        assert!(usual_path(false, |_| None).unwrap_err().to_string().contains("--file"));
        let state = |_: &str| Some(PathBuf::from("/state"));
        assert_eq!(usual_path(false, state).unwrap(), Path::new("/state/uhmm/far0"));
    }

    #[test]
    fn the_manifest_has_the_one_device() {
        let file = "64MiB:/data/far0".parse().unwrap();
        let plan = manifest_or_far(None, Some(file), None).unwrap().resolve().unwrap();
        let device = plan.device_by_name("far0").unwrap();
        assert_eq!((device.memory_bytes, device.path.as_deref()), (64 << 20, Some(Path::new("/data/far0"))));
        assert!(device.seal.is_sealed());
        assert_eq!(
            (plan.devices.len(), plan.service("far0").unwrap().command.join(" ")),
            (1, "driver file".to_owned())
        );
        let words = ["nbd://192.0.2.7/x".to_owned(), "64MiB".to_owned()];
        let plan = manifest_or_far(None, None, Some(&words)).unwrap().resolve().unwrap();
        let remote = plan.device_by_name("far0").unwrap().remote.as_ref().unwrap();
        assert_eq!(remote.urls[0].to_string(), "nbd://192.0.2.7:10809/x");
        assert_eq!(plan.service("far0").unwrap().command.join(" "), "driver nbd");
        let wrong = ["nbd://x".to_owned(), "64MiB".to_owned()];
        assert!(manifest_or_far(None, None, Some(&wrong)).unwrap_err().to_string().contains("nbd://x"));
    }
}
