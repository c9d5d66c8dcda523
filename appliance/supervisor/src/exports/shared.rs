//! A Unix socket that its connection's task reads and any thread may write to.

use crate::outbox::Direct;
use std::{
    io,
    os::fd::AsRawFd as _,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
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
            match self.0.try_read_buf(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result.map(|_| ())),
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
}
