//! Sockets as NBD connections need them: a Unix socket that its connection's task reads and any thread may write to, and a TCP socket
//! that can move to another thread's runtime.

use crate::outbox::Direct;
use nix::sys::socket::{MsgFlags, recv};
use std::{
    io,
    os::fd::AsRawFd as _,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::{TcpStream, UnixStream},
};

/// The task's side.
pub struct Shared(Arc<UnixStream>);

/// Everybody's side.
struct Anyone(Arc<UnixStream>);

pub fn split(stream: UnixStream) -> (Shared, Arc<dyn Direct>) {
    let stream = Arc::new(stream);
    (Shared(Arc::clone(&stream)), Arc::new(Anyone(stream)))
}

impl Direct for Anyone {
    fn try_send(&self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.try_write(bytes) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(0),
            result => result,
        }
    }
}

impl AsyncRead for Shared {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            let mut got = None;
            let tried = self.0.try_io(Interest::READABLE, || {
                let room = buf.initialize_unfilled();
                let wanted = room.len();
                let n = recv(self.0.as_raw_fd(), room, MsgFlags::MSG_DONTWAIT)?;
                got = Some(n);
                // Less than there was room for means that the socket is empty: said so now, the next look need not ask it again.
                if n > 0 && n < wanted { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
            });
            match (got, tried) {
                (Some(n), _) => {
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                (None, Err(e)) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                (None, result) => return Poll::Ready(result),
            }
        }
    }
}

impl AsyncWrite for Shared {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(cx))?;
            match self.0.try_write(bytes) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let ended = nix::sys::socket::shutdown(self.0.as_raw_fd(), nix::sys::socket::Shutdown::Write);
        Poll::Ready(ended.map_err(io::Error::from))
    }
}

/// A TCP socket that can move to another runtime, with whatever protocol state lies above it.
pub struct Movable(State);

enum State {
    /// Belongs to the runtime it was made in.
    Placed(TcpStream),
    /// Between two runtimes: placed by the first to use it.
    Moving(std::net::TcpStream),
    /// The operating system refused the move.
    Lost,
}

impl Movable {
    pub fn new(stream: TcpStream) -> Self {
        Self(State::Placed(stream))
    }

    /// Takes it out of its runtime; the next use puts it into the one it happens in.
    pub fn lift(&mut self) -> io::Result<()> {
        self.0 = match std::mem::replace(&mut self.0, State::Lost) {
            State::Placed(stream) => State::Moving(stream.into_std()?),
            other => other,
        };
        Ok(())
    }

    fn placed(&mut self) -> io::Result<Pin<&mut TcpStream>> {
        if let State::Moving(_) = &self.0
            && let State::Moving(stream) = std::mem::replace(&mut self.0, State::Lost)
        {
            self.0 = State::Placed(TcpStream::from_std(stream)?);
        }
        match &mut self.0 {
            State::Placed(stream) => Ok(Pin::new(stream)),
            State::Moving(_) | State::Lost => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

impl AsyncRead for Movable {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.placed()?.poll_read(cx, buf)
    }
}

impl AsyncWrite for Movable {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.placed()?.poll_write(cx, bytes)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.placed()?.poll_write_vectored(cx, bytes)
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.placed()?.poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.placed()?.poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::Outbox;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn both_sides_write_the_same_socket_and_a_full_one_is_left_to_the_task() {
        let (client, server) = UnixStream::pair().unwrap();
        let (mut task, anyone) = split(server);
        let (mut from, mut to) = client.into_split();
        to.write_all(b"ping").await.unwrap();
        let mut buf = [0; 4];
        task.read_exact(&mut buf).await.unwrap();
        assert_eq!(&buf, b"ping");
        let outbox = Outbox::default();
        outbox.set_direct(anyone);
        // Nobody fetches: at some point the socket is full, and what is left stays in the outbox, in order.
        let mut put = 0u32;
        let waker = std::task::Waker::noop();
        let mut left = Vec::new();
        while left.is_empty() {
            outbox.put(0, |out| (0..1000).for_each(|i| out.extend_from_slice(&(put * 1000 + i).to_le_bytes())));
            put += 1;
            outbox.wake();
            outbox.collect(&mut left, waker, false);
        }
        // While the task holds bytes, nothing may overtake them.
        outbox.put(0, |out| out.extend_from_slice(&u32::MAX.to_le_bytes()));
        outbox.wake();
        let total = put as usize * 4000 + 4;
        let reading = async {
            let mut all = vec![0; total];
            from.read_exact(&mut all).await.unwrap();
            all
        };
        let writing = async {
            task.write_all(&left).await.unwrap();
            left.clear();
            outbox.collect(&mut left, waker, false);
            task.write_all(&left).await.unwrap();
            task.shutdown().await.unwrap();
        };
        let (all, ()) = tokio::join!(reading, writing);
        let words: Vec<u32> = all.as_chunks::<4>().0.iter().map(|w| u32::from_le_bytes(*w)).collect();
        assert!(words[..words.len() - 1].iter().copied().eq(0..put * 1000) && words.last() == Some(&u32::MAX));
    }

    /// What came in pieces of any size arrives whole and in order, and the end of the stream is seen.
    #[tokio::test]
    async fn a_socket_that_said_it_is_empty_wakes_for_what_comes_later() {
        let (mut client, server) = UnixStream::pair().unwrap();
        let (mut task, _) = split(server);
        let sending = async {
            for round in 0..200usize {
                let piece = vec![round as u8; 1 + round * 37 % 5000];
                client.write_all(&piece).await.unwrap();
                if round % 3 == 0 {
                    tokio::task::yield_now().await;
                }
            }
            drop(client);
        };
        let mut got = Vec::new();
        let reading = async {
            // A buffer that is sometimes just filled.
            let mut buf = [0; 1024];
            loop {
                match task.read(&mut buf).await.unwrap() {
                    0 => return,
                    n => got.extend_from_slice(&buf[..n]),
                }
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(60), async { tokio::join!(sending, reading) })
            .await
            .expect("woken for everything");
        let want: Vec<u8> = (0..200usize).flat_map(|round| vec![round as u8; 1 + round * 37 % 5000]).collect();
        assert!(got == want, "{} of {} bytes, or others", got.len(), want.len());
    }

    /// Another thread's runtime goes on where this one stopped, in the middle of the bytes.
    #[test]
    fn a_socket_moves_to_another_runtime() {
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let (first, second) = (runtime(), runtime());
        let (mut moved, client) = first.block_on(async {
            let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
            let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let mut stream = Movable::new(listener.accept().await.unwrap().0);
            std::io::Write::write_all(&mut (&client), b"heretherethere").unwrap();
            let mut buf = [0; 4];
            stream.read_exact(&mut buf).await.unwrap();
            assert_eq!(&buf, b"here");
            stream.lift().unwrap();
            (stream, client)
        });
        drop(first);
        second.block_on(async {
            let mut buf = [0; 10];
            moved.read_exact(&mut buf).await.unwrap();
            assert_eq!(&buf, b"therethere");
            moved.write_all(b"back").await.unwrap();
            moved.shutdown().await.unwrap();
        });
        let mut back = String::new();
        std::io::Read::read_to_string(&mut (&client), &mut back).unwrap();
        assert_eq!(back, "back");
    }
}
