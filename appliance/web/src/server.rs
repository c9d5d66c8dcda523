//! Connections: TLS, HTTP/1.1, their bounds, and a good end.

use crate::{Answer, Web, request::Ask, respond, site};
use http::{Request, StatusCode};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
};
use tokio_rustls::TlsAcceptor;

/// At once. Each costs some tens of KiB.
pub const CONNECTIONS_MAX: usize = 256;
/// The handshake is done in the connection's own task, so that a slow one holds up nobody.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// Also how long a connection may lie idle.
const HEADER_LIMIT: Duration = Duration::from_secs(30);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long requests may go on when the daemon stops.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Serves until `stop` is true.
pub async fn serve(web: Arc<Web>, listener: TcpListener, tls: Arc<ServerConfig>, mut stop: watch::Receiver<bool>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let acceptor = TlsAcceptor::from(tls);
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = raised(&mut stop) => return,
        };
        let Ok((stream, from)) = accepted else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let (web, acceptor, stop) = (Arc::clone(&web), acceptor.clone(), stop.clone());
        tokio::spawn(async move {
            let _slot = slot;
            connection(web, acceptor, stream, from, stop).await;
        });
    }
}

/// Waits until the daemon stops, or nobody is left who could say so.
pub(crate) async fn raised(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn connection(
    web: Arc<Web>,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    from: SocketAddr,
    stop: watch::Receiver<bool>,
) {
    let _ = stream.set_nodelay(true);
    // Whoever speaks no TLS, or does not trust us, goes without a word from us.
    let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE_LIMIT, acceptor.accept(stream)).await else { return };
    let ending = stop.clone();
    let handle = move |request| answer(Arc::clone(&web), request, from.ip(), ending.clone());
    serve_connection(stream, stop, HEADER_LIMIT, handle).await;
}

/// HTTP/1.1 on a stream until it ends, is silent for `header_limit` between two requests, or `stop` is true: then what goes on may end.
pub async fn serve_connection<S, F>(
    stream: S,
    mut stop: watch::Receiver<bool>,
    header_limit: Duration,
    handle: impl Fn(Request<Incoming>) -> F,
) where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
    F: Future<Output = Answer>,
{
    let service = service_fn(move |request| {
        let answer = handle(request);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_limit)
        .max_buf_size(64 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        // A client that breaks off is its own business.
        _ = connection.as_mut() => return,
        () = raised(&mut stop) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = tokio::time::timeout(STOP_LIMIT, connection).await;
}

async fn answer(web: Arc<Web>, request: Request<Incoming>, from: IpAddr, stop: watch::Receiver<bool>) -> Answer {
    match Ask::read(request, from).await {
        Ok(ask) => site::handle(web, ask, stop).await,
        Err(e) => respond::bytes(StatusCode::BAD_REQUEST, "text/plain; charset=utf-8", format!("{e}\n")),
    }
}
