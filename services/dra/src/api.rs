//! The API server: plain HTTPS and JSON, one request at a time. Token and certificate authority are read each time, because both are exchanged while
//! a pod runs.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use ureq::http::Method;
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

/// The kubelet waits longer for a claim.
const PATIENCE: Duration = Duration::from_secs(10);
const GROUP: &str = "/apis/resource.k8s.io/v1";

/// Why the API server did not do it.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Nobody has said where it is.
    #[error("Nobody says where the API server is: give --api-server, or run in a pod of the cluster")]
    NoServer,
    /// Token or certificates.
    #[error("File {} cannot be used: {problem}", .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// It cannot be reached, or broke off.
    #[error("The API server at {url} does not answer")]
    Away {
        /// Where.
        url: String,
        /// What was met.
        source: Box<ureq::Error>,
    },
    /// There is no such object.
    #[error("{path} is not there: it was deleted, or this account may not see it")]
    NotFound {
        /// What was asked for.
        path: String,
    },
    /// Somebody else has changed it meanwhile.
    #[error("{path} was changed by somebody else meanwhile")]
    Conflict {
        /// What was to be changed.
        path: String,
    },
    /// It says no.
    #[error("The API server refuses {path} ({status}): {message}")]
    Refused {
        /// What was asked for.
        path: String,
        /// HTTP status.
        status: u16,
        /// Its words.
        message: String,
    },
}

/// Where it is and who we are.
#[derive(Clone, Debug)]
pub struct Api {
    /// `https://HOST:PORT`.
    pub server: Option<String>,
    /// See [`uhmm_dra_args::DraArgs::token_file`].
    pub token_file: PathBuf,
    /// Authority.
    pub ca: PathBuf,
}

/// As Kubernetes tells its pods.
pub fn in_cluster() -> Option<String> {
    let (host, port) = (std::env::var("KUBERNETES_SERVICE_HOST").ok()?, std::env::var("KUBERNETES_SERVICE_PORT").ok()?);
    Some(if host.contains(':') { format!("https://[{host}]:{port}") } else { format!("https://{host}:{port}") })
}

impl Api {
    /// A ResourceClaim.
    pub fn claim(&self, namespace: &str, name: &str) -> Result<Value, ApiError> {
        self.ask(Method::GET, &format!("{GROUP}/namespaces/{namespace}/resourceclaims/{name}"), None)
    }

    /// A node.
    pub fn node(&self, name: &str) -> Result<Value, ApiError> {
        self.ask(Method::GET, &format!("/api/v1/nodes/{name}"), None)
    }

    /// The ResourceSlices that a driver has of a node.
    pub fn slices(&self, driver: &str, node: &str) -> Result<Vec<Value>, ApiError> {
        let path = format!("{GROUP}/resourceslices?fieldSelector=spec.driver%3D{driver}%2Cspec.nodeName%3D{node}");
        let list = self.ask(Method::GET, &path, None)?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// A new one.
    pub fn create_slice(&self, slice: &Value) -> Result<Value, ApiError> {
        self.ask(Method::POST, &format!("{GROUP}/resourceslices"), Some(slice))
    }

    /// Another content, if it is what `slice` says it is (`resourceVersion`).
    pub fn replace_slice(&self, name: &str, slice: &Value) -> Result<Value, ApiError> {
        self.ask(Method::PUT, &format!("{GROUP}/resourceslices/{name}"), Some(slice))
    }

    /// It is gone afterwards.
    pub fn delete_slice(&self, name: &str) -> Result<(), ApiError> {
        match self.ask(Method::DELETE, &format!("{GROUP}/resourceslices/{name}"), None) {
            Err(ApiError::NotFound { .. }) | Ok(_) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn agent(&self, server: &str) -> Result<Agent, ApiError> {
        let config = Agent::config_builder()
            .timeout_global(Some(PATIENCE))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_idle_connections(0)
            // What a proxy of the environment is for, the API server is not.
            .proxy(None)
            .user_agent(concat!("uhmm-dra/", env!("CARGO_PKG_VERSION")));
        if !server.starts_with("https:") {
            return Ok(config.build().new_agent());
        }
        let wrong = |problem: String| ApiError::File { path: self.ca.clone(), problem };
        let pem = std::fs::read(&self.ca).map_err(|error| wrong(error.to_string()))?;
        let items = parse_pem(&pem).collect::<Result<Vec<_>, _>>().map_err(|error| wrong(error.to_string()))?;
        let certificate = |item| match item {
            PemItem::Certificate(certificate) => Some(certificate),
            _ => None,
        };
        let roots: Vec<_> = items.into_iter().filter_map(certificate).collect();
        if roots.is_empty() {
            return Err(wrong("there is no certificate in it".to_owned()));
        }
        let tls = TlsConfig::builder().root_certs(RootCerts::new_with_certs(&roots)).build();
        Ok(config.tls_config(tls).build().new_agent())
    }

    fn token(&self) -> Result<Option<String>, ApiError> {
        let wrong = |problem: String| ApiError::File { path: self.token_file.clone(), problem };
        match std::fs::read_to_string(&self.token_file) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            read => Ok(Some(format!("Bearer {}", read.map_err(|error| wrong(error.to_string()))?.trim()))),
        }
    }

    fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, ApiError> {
        let server = self.server.as_deref().ok_or(ApiError::NoServer)?.trim_end_matches('/');
        let url = format!("{server}{path}");
        let away = |source| ApiError::Away { url: server.to_owned(), source: Box::new(source) };
        let mut request = ureq::http::Request::builder().method(method).uri(&url).header("accept", "application/json");
        if let Some(token) = self.token()? {
            request = request.header("authorization", token);
        }
        let agent = self.agent(server)?;
        let response = match body {
            Some(body) => {
                let text = serde_json::to_string(body).unwrap_or_default();
                let request = request.header("content-type", "application/json").body(text);
                request.map_err(ureq::Error::from).and_then(|request| agent.run(request))
            }
            None => request.body(()).map_err(ureq::Error::from).and_then(|request| agent.run(request)),
        };
        answer(path, response.map_err(away)?, away)
    }
}

fn answer(
    path: &str,
    mut response: ureq::http::Response<Body>,
    away: impl Fn(ureq::Error) -> ApiError,
) -> Result<Value, ApiError> {
    let status = response.status().as_u16();
    let path = path.split('?').next().unwrap_or_default().to_owned();
    let body = response.body_mut().read_to_string().map_err(away)?;
    let read = serde_json::from_str::<Value>(&body);
    match (status, read) {
        (200..=299, Ok(object)) => Ok(object),
        (404, _) => Err(ApiError::NotFound { path }),
        (409, _) => Err(ApiError::Conflict { path }),
        (status, read) => {
            let words = read.ok().and_then(|object| object["message"].as_str().map(str::to_owned));
            let message = words.unwrap_or_else(|| format!("{:.200}", body.trim()));
            Err(ApiError::Refused { path, status, message })
        }
    }
}
