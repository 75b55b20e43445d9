//! TLS towards a collector: whom to trust, and who we are.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use super::export::{Protocol, Target};
use crate::portal::dial::{roots, tls_builder};

/// Why a certificate or key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// The file cannot be read, or holds nothing of the kind.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: pem::Error,
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
            let private = PrivateKeyDer::from_pem_file(key).map_err(file(key))?;
            builder
                .with_client_auth_cert(certificates(chain)?, private)
                .map_err(unusable(chain))?
        }
    };
    if target.protocol == Protocol::Grpc {
        config.alpn_protocols = vec![b"h2".to_vec()];
    }
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .map_err(file(path))?
        .collect();
    let all = all.map_err(file(path))?;
    if all.is_empty() {
        return Err(file(path)(pem::Error::NoItemsFound));
    }
    Ok(all)
}

fn file(path: &Path) -> impl FnOnce(pem::Error) -> CertificateError {
    let path = path.to_owned();
    |source| CertificateError::File { path, source }
}

fn unusable(path: &Path) -> impl FnOnce(rustls::Error) -> CertificateError {
    let path = path.to_owned();
    |source| CertificateError::Unusable { path, source }
}
