//! A kubelet, as far as a DRA driver sees one: it finds the driver by its registration socket, and asks it for claims. HTTP/2 is hyper's; gRPC's frames
//! are put together here, so that the driver's are held against something else than its own library.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::net::UnixStream;

use crate::wire::{
    Claim, ClaimsRequest, InfoRequest, PluginInfo, PrepareResponse, PreparedClaim, RegistrationStatus,
    RegistrationStatusResponse, UnprepareResponse,
};

/// Longer than anything that the driver waits for.
const PATIENCE: Duration = Duration::from_secs(40);

/// Calls to one driver.
#[derive(Clone, Debug)]
pub struct Kubelet {
    /// Its folder.
    pub dir: PathBuf,
    /// Which of the driver's versions it speaks: `v1` or `v1beta1`.
    pub version: &'static str,
}

/// One call. `Err`: what gRPC or the connection say.
fn call<Q: Message, A: Message + Default>(socket: &Path, path: &str, request: &Q) -> Result<A, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let exchanged = runtime.block_on(async { tokio::time::timeout(PATIENCE, exchange(socket, path, request)).await });
    exchanged.unwrap_or_else(|_| Err(format!("{path}: no answer")))
}

async fn exchange<Q: Message, A: Message + Default>(socket: &Path, path: &str, request: &Q) -> Result<A, String> {
    let text = |error: &dyn std::fmt::Display| format!("{path}: {error}");
    let stream = UnixStream::connect(socket).await.map_err(|error| text(&error))?;
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .map_err(|error| text(&error))?;
    tokio::spawn(connection);
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(request.encoded_len()).expect("short"));
    request.encode(&mut frame).expect("room");
    let request = Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::<Bytes>::new(frame.freeze()))
        .expect("a request");
    let response = sender.send_request(request).await.map_err(|error| text(&error))?;
    let headers = response.headers().clone();
    let body = response.into_body().collect().await.map_err(|error| text(&error))?;
    let trailers = body.trailers().cloned().unwrap_or_default();
    let status = trailers.get("grpc-status").or_else(|| headers.get("grpc-status")).cloned();
    let words = trailers.get("grpc-message").or_else(|| headers.get("grpc-message")).cloned();
    if status.as_ref().is_none_or(|status| status != "0") {
        return Err(format!("{path}: status {status:?} {words:?}"));
    }
    let bytes = body.to_bytes();
    let (head, message) = bytes.split_at_checked(5).ok_or_else(|| format!("{path}: no frame"))?;
    assert_eq!((head[0], u32::from_be_bytes(head[1..5].try_into().expect("four")) as usize), (0, message.len()));
    A::decode(message).map_err(|error| text(&error))
}

/// A claim as the kubelet names it.
pub fn claim(name: &str) -> Claim {
    Claim { namespace: "default".to_owned(), uid: format!("uid-{name}"), name: name.to_owned() }
}

impl Kubelet {
    /// With the folders that every kubelet has.
    pub fn new(dir: &Path) -> Self {
        for folder in ["plugins", "plugins_registry"] {
            std::fs::create_dir_all(dir.join(folder)).expect("a folder");
        }
        Self { dir: dir.to_owned(), version: "v1" }
    }

    /// Registers every driver whose socket is in the folder for that: one.
    pub fn register(&self) -> PluginInfo {
        let registry = self.dir.join("plugins_registry");
        let found: Vec<PathBuf> =
            std::fs::read_dir(registry).expect("the folder").map(|entry| entry.expect("an entry").path()).collect();
        let [socket] = found.as_slice() else { panic!("{found:?}") };
        let info: PluginInfo =
            call(socket, "/pluginregistration.Registration/GetInfo", &InfoRequest {}).expect("its info");
        let status = RegistrationStatus { plugin_registered: true, error: String::new() };
        let path = "/pluginregistration.Registration/NotifyRegistrationStatus";
        let told: Result<RegistrationStatusResponse, _> = call(socket, path, &status);
        told.expect("it is told");
        info
    }

    /// A call of the plugin's, by its name.
    pub fn ask<A: Message + Default>(&self, method: &str, claims: Vec<Claim>) -> Result<A, String> {
        let socket = self.dir.join("plugins/uhmm.internal/dra.sock");
        let path = format!("/k8s.io.kubelet.pkg.apis.dra.{}.DRAPlugin/{method}", self.version);
        call(&socket, &path, &ClaimsRequest { claims })
    }

    /// One claim.
    pub fn prepare(&self, name: &str) -> Result<PreparedClaim, String> {
        let mut answer: PrepareResponse = self.ask("NodePrepareResources", vec![claim(name)])?;
        assert_eq!(answer.claims.len(), 1, "{answer:?}");
        Ok(answer.claims.remove(&claim(name).uid).expect("the claim's own answer"))
    }

    /// Until it is: the kubelet asks again and again.
    pub fn prepared(&self, name: &str) -> PreparedClaim {
        let answer = self.prepare(name).expect("an answer");
        assert_eq!(answer.error, "", "{name}");
        assert!(!answer.devices.is_empty());
        answer
    }

    /// What the driver says that is wrong with it.
    pub fn refused(&self, name: &str) -> String {
        let answer = self.prepare(name).expect("an answer");
        assert!(!answer.error.is_empty() && answer.devices.is_empty(), "{answer:?}");
        answer.error
    }

    /// One claim.
    pub fn unprepare(&self, name: &str) -> Result<String, String> {
        let mut answer: UnprepareResponse = self.ask("NodeUnprepareResources", vec![claim(name)])?;
        Ok(answer.claims.remove(&claim(name).uid).expect("the claim's own answer").error)
    }
}
