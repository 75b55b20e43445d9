//! TLS towards a collector: whom to trust, and who we are.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use super::export::{Protocol, Target};
use crate::kept_files;
use crate::portal::dial::{roots, tls_builder};

/// Why a certificate or key cannot be used. Never holds what is in the file: of a key file without
/// its line breaks, the parser's errors have the key in them, also in `Debug`.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// The file cannot be read, or holds nothing of the kind.
    #[error("{}: {why}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// What the file holds is not what is asked for.
    #[error("{}: {source}", path.display())]
    Unusable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
}

/// As for the portal, unless other certificates are named.
pub(super) fn config(target: &Target) -> Result<Arc<ClientConfig>, CertificateError> {
    let trusted = match &target.certificate {
        None => roots(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(path)? {
                roots.add(certificate).map_err(unusable(path))?;
            }
            roots
        }
    };
    let builder = tls_builder().with_root_certificates(trusted);
    let mut config = match &target.client {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => {
            let private = open(key)
                .and_then(PrivateKeyDer::from_pem_reader)
                .map_err(file(key, "key"))?;
            // Asked first, for its errors do not say whether they are about the key.
            builder
                .crypto_provider()
                .key_provider
                .load_private_key(private.clone_key())
                .map_err(unusable(key))?;
            builder
                .with_client_auth_cert(certificates(chain)?, private)
                .map_err(|error| match error {
                    rustls::Error::InconsistentKeys(_) => unusable(key)(error),
                    _ => unusable(chain)(error),
                })?
        }
    };
    if target.protocol == Protocol::Grpc {
        config.alpn_protocols = vec![b"h2".to_vec()];
    }
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let failed = || file(path, "certificate");
    let all: Result<Vec<_>, _> =
        CertificateDer::pem_reader_iter(open(path).map_err(failed())?).collect();
    let all = all.map_err(failed())?;
    if all.is_empty() {
        return Err(failed()(pem::Error::NoItemsFound));
    }
    Ok(all)
}

fn open(path: &Path) -> Result<impl Read, pem::Error> {
    kept_files::open(path).map_err(pem::Error::Io)
}

/// In words of our own.
fn file(path: &Path, what: &str) -> impl FnOnce(pem::Error) -> CertificateError {
    move |error| CertificateError::File {
        path: path.to_owned(),
        why: match error {
            pem::Error::Io(error) => error.to_string(),
            pem::Error::NoItemsFound => format!("no {what} in it"),
            _ => "not valid PEM".to_owned(),
        },
    }
}

fn unusable(path: &Path) -> impl FnOnce(rustls::Error) -> CertificateError {
    let path = path.to_owned();
    |source| CertificateError::Unusable { path, source }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use firezone_lab::portal::tls::Identity;

    use super::super::export::{Export, Signal};
    use super::*;
    use crate::config::FixedEnv;

    /// What comes of files with these contents.
    fn with(chain: &str, key: &str) -> Result<Arc<ClientConfig>, CertificateError> {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let (chain, key) = (write("us.pem", chain), write("us.key", key));
        let env: FixedEnv = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://c:4318"),
            ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", chain.as_str()),
            ("OTEL_EXPORTER_OTLP_CLIENT_KEY", key.as_str()),
        ]
        .into_iter()
        .collect();
        config(Export::decide(&env, Signal::Logs).target().unwrap())
    }

    const KEY: &str = "-----BEGIN PRIVATE KEY-----\nhunter2hunter2AA\n-----END PRIVATE KEY-----\n";

    #[test]
    fn a_key_without_its_line_breaks_is_not_shown() {
        let bytes = "hunter2".bytes().map(|b| b.to_string());
        let bytes = bytes.collect::<Vec<_>>().join(", ");
        let chain = Identity::new(&["us".to_owned()], false).unwrap().pem();
        for broken in [
            KEY.replace('\n', " "),
            KEY.replace('\n', "\\n"),
            KEY.replace("-----END", "-----"),
            KEY.replace("hunter2A", "hunter2*"),
        ] {
            let error = with(&chain, &broken).unwrap_err();
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains("hunter2"), "{shown}");
            assert!(!shown.contains(&bytes), "{shown}");
            assert!(error.to_string().contains("us.key: "), "{error}");
        }
    }

    #[test]
    fn errors_name_the_file_and_what_is_wrong() {
        let chain = Identity::new(&["us".to_owned()], false).unwrap().pem();
        for (chain, key, words) in [
            (chain.as_str(), "", "us.key: no key in it"),
            (&chain, KEY, "us.key: "),
            (&chain, &KEY.replace('\n', " "), "us.key: not valid PEM"),
        ] {
            let error = with(chain, key).unwrap_err().to_string();
            assert!(error.contains(words), "{words}: {error}");
        }
        let missing = certificates(Path::new("/nowhere/ca.pem")).unwrap_err();
        let told = missing.to_string();
        assert!(told.starts_with("/nowhere/ca.pem: No such file"), "{told}");
        let empty = certificates(Path::new("/dev/null")).unwrap_err();
        assert_eq!(empty.to_string(), "/dev/null: no certificate in it");
    }
}
