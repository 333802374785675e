//! What `uhmm dra` is told. A crate of its own, so that `uhmm` has help, manual and completions of it without what the driver is built of.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

/// Folder of the service account that Kubernetes mounts into a pod.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// See the module head.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct DraArgs {
    /// This node's name in the cluster
    #[arg(long, env = "NODE_NAME")]
    pub node_name: String,
    /// Name of the driver in ResourceSlices and DeviceClasses, a DNS name; also the vendor of the CDI devices
    #[arg(long, default_value = "uhmm.internal")]
    pub driver_name: String,
    /// The kubelet's folder; in a container under the same path as on the node
    #[arg(long, default_value = "/var/lib/kubelet")]
    pub kubelet_dir: PathBuf,
    /// Where container runtimes look for CDI files
    #[arg(long, default_value = "/var/run/cdi")]
    pub cdi_dir: PathBuf,
    /// Folder of the sockets on this machine, which programs are given; if it is not RUN_DIR/clients or RUN_DIR
    #[arg(long)]
    pub sockets: Option<PathBuf>,
    /// `https://HOST:PORT` of the API server; in a pod of the cluster it is known
    #[arg(long)]
    pub api_server: Option<String>,
    /// File with the token that the API server is shown; read again each time. Not there: none is shown
    #[arg(long, default_value_os_t = PathBuf::from(ACCOUNT).join("token"))]
    pub token_file: PathBuf,
    /// File with the certificate authority of the API server (PEM)
    #[arg(long, default_value_os_t = PathBuf::from(ACCOUNT).join("ca.crt"))]
    pub ca: PathBuf,
    /// Seconds between two looks at the devices
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    pub interval: u64,
    /// Log format: text or json
    #[arg(long, default_value = "text", value_parser = ["text", "json"])]
    pub log: String,
    /// Only look whether the driver that runs here accepts connections (for probes)
    #[arg(long)]
    pub probe: bool,
}

impl DraArgs {
    /// The same as words, for the program that does it.
    pub fn to_words(&self) -> Vec<OsString> {
        let Self {
            node_name,
            driver_name,
            kubelet_dir,
            cdi_dir,
            sockets,
            api_server,
            token_file,
            ca,
            interval,
            log,
            probe,
        } = self;
        let mut words: Vec<OsString> = Vec::new();
        let mut put = |name: &str, value: OsString| words.extend([OsString::from(name), value]);
        put("--node-name", node_name.into());
        put("--driver-name", driver_name.into());
        put("--kubelet-dir", kubelet_dir.into());
        put("--cdi-dir", cdi_dir.into());
        if let Some(sockets) = sockets {
            put("--sockets", sockets.into());
        }
        if let Some(api_server) = api_server {
            put("--api-server", api_server.into());
        }
        put("--token-file", token_file.into());
        put("--ca", ca.into());
        put("--interval", interval.to_string().into());
        put("--log", log.into());
        words.extend(probe.then(|| "--probe".into()));
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: DraArgs,
    }

    #[test]
    fn the_words_say_the_same_again() {
        let given = [
            "x --node-name n --probe --sockets /s --api-server http://h:1 --interval 3 --log json",
            "x --node-name=n-1 --driver-name d.example.com --kubelet-dir /k --cdi-dir /c --token-file /t --ca /a",
        ];
        for given in given {
            let args = Cli::parse_from(given.split(' ')).args;
            let words = std::iter::once(OsString::from("x")).chain(args.to_words());
            assert_eq!(Cli::parse_from(words).args, args);
        }
        assert!(Cli::try_parse_from(["x", "--node-name", "n", "--interval", "0"]).is_err());
    }
}
