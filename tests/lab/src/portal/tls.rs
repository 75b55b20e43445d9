//! TLS in front of the portal, with certificates that are as wrong as a test wants them.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use rcgen::{CertificateParams, KeyPair};
use time::{Duration, OffsetDateTime};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::{self, ServerConfig, pki_types};

/// A certificate and its key; the certificate is its own authority.
#[derive(Debug)]
pub struct Identity {
    certificate: rcgen::Certificate,
    key: KeyPair,
}

impl Identity {
    /// For these DNS names and addresses. It is valid from yesterday until tomorrow, or was until
    /// an hour ago.
    ///
    /// # Errors
    /// If a name cannot stand in a certificate.
    pub fn new(names: &[String], expired: bool) -> anyhow::Result<Self> {
        let now = OffsetDateTime::now_utc();
        let mut params = CertificateParams::new(names.to_vec())?;
        params.not_before = now - Duration::days(1);
        params.not_after = if expired {
            now - Duration::hours(1)
        } else {
            now + Duration::days(1)
        };
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        Ok(Self { certificate, key })
    }

    /// The certificate, for `SSL_CERT_FILE`.
    pub fn pem(&self) -> String {
        self.certificate.pem()
    }

    /// The certificate.
    pub fn der(&self) -> pki_types::CertificateDer<'static> {
        self.certificate.der().clone()
    }

    fn acceptor(&self) -> anyhow::Result<TlsAcceptor> {
        let key = pki_types::PrivatePkcs8KeyDer::from(self.key.serialize_der());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![self.der()], key.into())?;
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

/// Listens with TLS and passes everything on to a plain listener. Ends when dropped.
#[derive(Debug)]
pub struct Front {
    address: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Front {
    /// Starts one.
    ///
    /// # Errors
    /// If the address cannot be listened on.
    pub async fn start(
        listen: SocketAddr,
        upstream: SocketAddr,
        identity: &Identity,
    ) -> anyhow::Result<Self> {
        let acceptor = identity.acceptor()?;
        let listener = TcpListener::bind(listen)
            .await
            .with_context(|| format!("cannot listen on {listen}"))?;
        let address = listener.local_addr()?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let stream = match listener.accept().await {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        tracing::warn!(%error, "TLS connection not accepted");
                        continue;
                    }
                };
                let acceptor = acceptor.clone();
                connections.spawn(async move {
                    if let Err(error) = pass(stream, upstream, acceptor).await {
                        tracing::debug!(%error, "TLS connection ended");
                    }
                });
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Self {
            address,
            _tasks: tasks,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn pass(stream: TcpStream, upstream: SocketAddr, acceptor: TlsAcceptor) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut outside = acceptor.accept(stream).await?;
    let mut inside = TcpStream::connect(upstream).await?;
    inside.set_nodelay(true)?;
    tokio::io::copy_bidirectional(&mut outside, &mut inside).await?;
    Ok(())
}
