//! Moves one connection's bytes in both directions, in one future without further tasks.
//!
//! It reads all that has come, lets a [`Parser`] hand on what is whole in it, and sends all answers that are in the [`Outbox`] with
//! one write. Reading and writing go on independently: a peer that does not fetch its answers stops being read, one that is slow to
//! send is still answered.
//!
//! **Limits.** `budget` of work handed on and not answered; [`OUTPUT_BYTES_MAX`] of answers the peer does not fetch.

use crate::outbox::{Outbox, Standing};
use bytes::BytesMut;
use std::{
    future::{Future as _, poll_fn},
    io,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};

/// Answers not yet accepted by the socket; beyond it nothing more is read.
const OUTPUT_BYTES_MAX: usize = 4 << 20;
/// Read from the socket at once: a deep queue of 4 KiB writes in one system call.
const INPUT_BYTES: usize = 256 << 10;

/// What a parser made of the input.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Parsed {
    /// Nothing can be done before the input holds this many bytes.
    Wants(usize),
    /// The room is used up; there may be more in the input.
    NoRoom,
    /// The peer said it is done: answer what is owed and close.
    Ending,
}

/// Cuts a protocol's units out of a stream of bytes.
pub trait Parser {
    type Error: From<io::Error>;
    /// Takes units off `input` and hands them on as long as their cost stays within `room` (one may go beyond it), adding what
    /// it hands on to the outbox's debt. What can be answered at once may be put into `out`.
    fn parse(&mut self, input: &mut BytesMut, out: &mut Vec<u8>, room: usize) -> Result<Parsed, Self::Error>;
    /// Whether the stream may end here without having been broken off.
    fn between_units(&self, input: &BytesMut) -> bool {
        input.is_empty()
    }
}

/// Pumps until the peer ends (`Ok`), either side breaks off, or the outbox was closed. `input` may hold bytes read before.
pub async fn pump<S, P>(
    stream: &mut S,
    outbox: &Arc<Outbox>,
    parser: &mut P,
    budget: usize,
    input: BytesMut,
) -> Result<(), P::Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
    P: Parser,
{
    let wanted = 1;
    let output = Vec::new();
    let mut pump =
        Pump { stream, outbox, parser, budget, input, wanted, ending: false, output, sent: 0, unflushed: false };
    poll_fn(|cx| pump.poll(cx)).await
}

struct Pump<'a, S, P> {
    stream: &'a mut S,
    outbox: &'a Arc<Outbox>,
    parser: &'a mut P,
    budget: usize,
    input: BytesMut,
    wanted: usize,
    ending: bool,
    output: Vec<u8>,
    sent: usize,
    unflushed: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin, P: Parser> Pump<'_, S, P> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), P::Error>> {
        loop {
            let mut found = None;
            if self.sent == self.output.len() {
                self.output.clear();
                self.sent = 0;
                // Asks to be woken and looks under one lock: an answer put there later wakes us.
                found = Some(self.outbox.collect(&mut self.output, cx.waker(), self.ending));
            }
            let mut moved = self.write(cx)?;
            if let Some(found) = found
                && self.output.len() == self.sent
                && !self.unflushed
                && (found.closing || (self.ending && found.owed == 0))
                && !moved
            {
                return Poll::Ready(Ok(()));
            }
            let closing = found.is_some_and(|f| f.closing);
            if !self.ending && !closing && self.output.len() - self.sent <= OUTPUT_BYTES_MAX {
                moved |= self.parse()?;
                moved |= match self.read(cx) {
                    Poll::Ready(Ok(true)) => true,
                    Poll::Ready(Ok(false)) => return Poll::Ready(self.hung_up().map_err(Into::into)),
                    Poll::Ready(Err(e)) => return Poll::Ready(Err(e.into())),
                    Poll::Pending => false,
                };
            }
            if !moved {
                return Poll::Pending;
            }
        }
    }

    /// Sends what there is; whether anything went.
    fn write(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        let before = self.sent;
        while self.sent < self.output.len() {
            match Pin::new(&mut *self.stream).poll_write(cx, &self.output[self.sent..]) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(n)) => {
                    self.sent += n;
                    self.unflushed = true;
                }
                Poll::Ready(Err(e)) => return Err(e),
                Poll::Pending => return Ok(self.sent != before),
            }
        }
        if self.unflushed
            && let Poll::Ready(result) = Pin::new(&mut *self.stream).poll_flush(cx)
        {
            result?;
            self.unflushed = false;
            return Ok(true);
        }
        Ok(self.sent != before)
    }

    /// Hands on what is whole and within the budget; whether there was anything.
    fn parse(&mut self) -> Result<bool, P::Error> {
        if self.input.len() < self.wanted {
            return Ok(false);
        }
        let had = self.input.len();
        let mut room = self.room(self.outbox.standing());
        if room == 0 {
            // Only who asks is told; and looks again, for it may have fallen in between.
            room = self.room(self.outbox.starve());
            if room == 0 {
                return Ok(false);
            }
        }
        let mut said = Vec::new();
        match self.parser.parse(&mut self.input, &mut said, room)? {
            Parsed::Wants(bytes) => self.wanted = bytes.max(1),
            Parsed::NoRoom => self.wanted = 1,
            Parsed::Ending => self.ending = true,
        }
        if !said.is_empty() {
            // By way of the outbox: others may be sending an answer of which only a part has gone out.
            self.outbox.put(0, |out| out.extend_from_slice(&said));
            return Ok(true);
        }
        Ok(self.input.len() != had || self.ending)
    }

    /// What may still be handed on: nothing while the peer leaves too much unfetched, here or in the outbox.
    fn room(&self, standing: Standing) -> usize {
        let unfetched = self.output.len() - self.sent + standing.waiting;
        if unfetched > OUTPUT_BYTES_MAX { 0 } else { self.budget.saturating_sub(standing.owed) }
    }

    /// Reads once; false at the end of the stream.
    fn read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        // What is there already waits for room: more would only wait with it. The one who makes room wakes us.
        if self.ending || self.input.len() >= self.wanted {
            return Poll::Pending;
        }
        let missing = self.wanted - self.input.len();
        if self.input.capacity() - self.input.len() < missing.max(INPUT_BYTES / 4) {
            self.input.reserve(missing.max(INPUT_BYTES));
        }
        pin!(self.stream.read_buf(&mut self.input)).poll(cx).map_ok(|n| n > 0)
    }

    /// A peer may end by closing the connection between two units, rude as it is; inside one it broke off.
    fn hung_up(&self) -> io::Result<()> {
        if self.parser.between_units(&self.input) { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Buf as _;
    use std::collections::VecDeque;
    use tokio::io::{AsyncWriteExt as _, duplex};

    /// Units of one length byte and so many bytes; an empty one ends.
    struct Units<'a> {
        outbox: &'a Arc<Outbox>,
        got: &'a std::sync::Mutex<VecDeque<Vec<u8>>>,
    }
    impl Parser for Units<'_> {
        type Error = io::Error;
        fn parse(&mut self, input: &mut BytesMut, _: &mut Vec<u8>, room: usize) -> io::Result<Parsed> {
            let mut used = 0;
            while used < room {
                let Some(len) = input.first().map(|l| usize::from(*l)) else { return Ok(Parsed::Wants(1)) };
                if len == 0 {
                    return Ok(Parsed::Ending);
                }
                if input.len() < 1 + len {
                    return Ok(Parsed::Wants(1 + len));
                }
                input.advance(1);
                self.outbox.take_on(len);
                used += len;
                crate::lock(self.got).push_back(input.split_to(len).to_vec());
            }
            Ok(Parsed::NoRoom)
        }
    }

    /// An echo served by another thread, a budget of a few units, narrow pipes: nothing is lost, nothing stands still.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_tight_budget_and_narrow_pipes_lose_nothing() {
        for (pipe, budget) in [(1, 1), (7, 300), (64, 40), (1 << 16, 1 << 16)] {
            let (mut client, mut server) = duplex(pipe);
            let outbox = Arc::new(Outbox::default());
            let got = Arc::new(std::sync::Mutex::new(VecDeque::new()));
            let pumping = tokio::spawn({
                let (outbox, got) = (Arc::clone(&outbox), Arc::clone(&got));
                async move {
                    let mut units = Units { outbox: &outbox, got: &got };
                    pump(&mut server, &outbox, &mut units, budget, BytesMut::new()).await
                }
            });
            let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
            let worker = std::thread::spawn({
                let (outbox, got, stop) = (Arc::clone(&outbox), Arc::clone(&got), Arc::clone(&stop));
                move || {
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        let unit = crate::lock(&got).pop_front();
                        let Some(unit) = unit else {
                            std::thread::yield_now();
                            continue;
                        };
                        assert!(outbox.owed() <= budget + 255, "{} owed with a budget of {budget}", outbox.owed());
                        outbox.put(unit.len(), |out| out.extend_from_slice(&unit));
                        outbox.wake();
                    }
                }
            });
            let (mut sent, mut sum) = (Vec::new(), Vec::new());
            for i in 0..600u32 {
                let len = (i * 37 % 255 + 1) as u8;
                sent.push(len);
                sent.extend((0..len).map(|b| b.wrapping_add(i as u8)));
                sum.extend((0..len).map(|b| b.wrapping_add(i as u8)));
            }
            sent.push(0);
            let (mut from, mut to) = tokio::io::split(&mut client);
            let writing = async { to.write_all(&sent).await.unwrap() };
            let mut back = Vec::new();
            let reading = async { from.read_to_end(&mut back).await.unwrap() };
            tokio::join!(writing, reading);
            pumping.await.unwrap().unwrap();
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            worker.join().unwrap();
            assert!(back == sum, "pipe {pipe}, budget {budget}: the echo differs");
        }
    }

    #[tokio::test]
    async fn breaking_off_inside_a_unit_is_told_from_hanging_up() {
        for (bytes, fine) in [(&[][..], true), (&[3, 1][..], false), (&[1, 9][..], true)] {
            let (mut client, mut server) = duplex(64);
            client.write_all(bytes).await.unwrap();
            drop(client);
            let (outbox, got) = (Arc::default(), std::sync::Mutex::default());
            let mut units = Units { outbox: &outbox, got: &got };
            let ended = pump(&mut server, &outbox, &mut units, 1000, BytesMut::new()).await;
            assert_eq!(ended.is_ok(), fine, "{bytes:?}: {ended:?}");
        }
    }

    /// What the parser says itself and what others answer are two sources of one stream: neither may begin inside the other's unit.
    #[tokio::test]
    async fn an_answer_that_is_half_sent_is_finished_before_anything_else_is_said() {
        use crate::outbox::Direct;
        use std::{
            pin::Pin,
            task::{Context, Poll},
        };
        #[derive(Clone, Default)]
        struct Wire(Arc<std::sync::Mutex<Vec<u8>>>);
        impl Direct for Wire {
            fn try_send(&self, bytes: &[u8]) -> io::Result<usize> {
                let fits = bytes.len().min(3);
                crate::lock(&self.0).extend_from_slice(&bytes[..fits]);
                Ok(fits)
            }
        }
        struct Stream(Wire, VecDeque<u8>);
        impl tokio::io::AsyncRead for Stream {
            fn poll_read(
                mut self: Pin<&mut Self>,
                _: &mut Context<'_>,
                buf: &mut tokio::io::ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                match self.1.pop_front() {
                    Some(byte) => buf.put_slice(&[byte]),
                    None => return Poll::Pending,
                }
                Poll::Ready(Ok(()))
            }
        }
        impl AsyncWrite for Stream {
            fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
                crate::lock(&self.0.0).extend_from_slice(bytes);
                Poll::Ready(Ok(bytes.len()))
            }
            fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
                Poll::Ready(Ok(()))
            }
            fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
                Poll::Ready(Ok(()))
            }
        }
        /// While it makes its own answer, somebody else's goes out in part.
        struct Refuser<'a>(&'a Arc<Outbox>);
        impl Parser for Refuser<'_> {
            type Error = io::Error;
            fn parse(&mut self, input: &mut BytesMut, out: &mut Vec<u8>, _: usize) -> io::Result<Parsed> {
                match input.first() {
                    None => return Ok(Parsed::Wants(1)),
                    Some(0) => return Ok(Parsed::Ending),
                    Some(_) => input.advance(1),
                }
                self.0.put(0, |out| out.extend_from_slice(b"AAAAAAAA"));
                self.0.wake();
                out.extend_from_slice(b"rrrr");
                Ok(Parsed::NoRoom)
            }
        }
        let (wire, outbox) = (Wire::default(), Arc::new(Outbox::default()));
        outbox.set_direct(Arc::new(wire.clone()));
        let mut stream = Stream(wire.clone(), VecDeque::from([1, 1, 0]));
        pump(&mut stream, &outbox, &mut Refuser(&outbox), 1000, BytesMut::new()).await.unwrap();
        assert_eq!(String::from_utf8(crate::lock(&wire.0).clone()).unwrap(), "AAAAAAAArrrrAAAAAAAArrrr");
    }

    /// A peer that asks and asks and fetches nothing is not read any more: its answers would fill the memory.
    #[tokio::test]
    async fn answers_that_nobody_fetches_are_bounded() {
        /// Each byte is a question; the answer is there at once, and a thousand times as long.
        struct Generous<'a>(&'a Arc<Outbox>);
        impl Parser for Generous<'_> {
            type Error = io::Error;
            fn parse(&mut self, input: &mut BytesMut, _: &mut Vec<u8>, room: usize) -> io::Result<Parsed> {
                assert!(room > 0);
                let asked = input.len().min(64);
                input.advance(asked);
                self.0.put(0, |out| out.resize(out.len() + asked * 1000, 7));
                self.0.wake();
                Ok(if asked == 64 { Parsed::NoRoom } else { Parsed::Wants(1) })
            }
        }
        let (mut client, mut server) = duplex(1 << 16);
        let outbox = Arc::new(Outbox::default());
        let mut generous = Generous(&outbox);
        let pumping = pump(&mut server, &outbox, &mut generous, 1000, BytesMut::new());
        let asking = async {
            // Until nothing is taken any more; it would be 256 MB of answers.
            for _ in 0..64 {
                let taken = client.write_all(&[1; 1 << 12]);
                match tokio::time::timeout(std::time::Duration::from_millis(200), taken).await {
                    Ok(written) => written.unwrap(),
                    Err(_) => return,
                }
            }
        };
        tokio::select! {
            ended = pumping => panic!("it ended: {ended:?}"),
            () = asking => {}
        }
        let waiting = outbox.standing().waiting;
        assert!(waiting <= OUTPUT_BYTES_MAX + 64_000, "{waiting} bytes of answers wait");
        // What was held up goes on once it is fetched.
        let pumping = async { pump(&mut server, &outbox, &mut Generous(&outbox), 1000, BytesMut::new()).await };
        let fetching = async {
            let mut some = vec![0; 1 << 20];
            for _ in 0..8 {
                client.read_exact(&mut some).await.unwrap();
            }
        };
        tokio::select! {
            ended = pumping => panic!("it ended: {ended:?}"),
            () = fetching => {}
        }
    }

    #[tokio::test]
    async fn a_closed_outbox_is_sent_to_its_end() {
        let (mut client, mut server) = duplex(16);
        let (outbox, got) = (Arc::new(Outbox::default()), std::sync::Mutex::default());
        outbox.put(0, |out| out.extend_from_slice(&[7; 1000]));
        outbox.close();
        let mut units = Units { outbox: &outbox, got: &got };
        let mut back = Vec::new();
        let pumping = async {
            pump(&mut server, &outbox, &mut units, 1000, BytesMut::new()).await.unwrap();
            drop(server);
        };
        let (_, n) = tokio::join!(pumping, client.read_to_end(&mut back));
        assert_eq!(n.unwrap(), 1000);
    }
}
