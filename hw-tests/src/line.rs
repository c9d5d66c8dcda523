//! A network line with faults: TCP connections carried to a port of this machine, until they are cut or go half-open.
//!
//! Loopback only. A **cut** closes everything at both ends and refuses what comes until [`Line::mend`]. **Half-open** leaves every connection
//! of now standing and carries nothing on it any more, not even its end; new ones are carried. Ends when dropped.

use anyhow::Result;
use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

/// How often a carrier looks whether its connection still goes through.
const LOOK: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub struct Line {
    at: SocketAddr,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    to: SocketAddr,
    ended: AtomicBool,
    cut: AtomicBool,
    accepted: AtomicU64,
    /// Connections up to this number are half-open.
    dead_through: AtomicU64,
    /// Both ends of each connection, for closing.
    open: Mutex<Vec<TcpStream>>,
}

impl Line {
    pub fn to(to: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let at = listener.local_addr()?;
        let state = Arc::new(State {
            to,
            ended: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            accepted: AtomicU64::new(0),
            dead_through: AtomicU64::new(0),
            open: Mutex::default(),
        });
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for arrived in listener.incoming() {
                if shared.ended.load(Ordering::Relaxed) {
                    return;
                }
                // One that cannot be carried is closed: as a refused connection to its client.
                if let Ok(client) = arrived
                    && !shared.cut.load(Ordering::Relaxed)
                    && let Err(e) = carry(&shared, &client)
                {
                    eprintln!("line: {e:#}");
                }
            }
        });
        Ok(Self { at, state })
    }
    pub fn at(&self) -> SocketAddr {
        self.at
    }
    /// Connections that were carried, from the first on.
    pub fn accepted(&self) -> u64 {
        self.state.accepted.load(Ordering::Relaxed)
    }
    pub fn cut(&self) {
        self.state.cut.store(true, Ordering::Relaxed);
        self.state.close_all();
    }
    pub fn mend(&self) {
        self.state.cut.store(false, Ordering::Relaxed);
    }
    pub fn half_open(&self) {
        self.state.dead_through.store(self.accepted(), Ordering::Relaxed);
    }
}

impl State {
    fn close_all(&self) {
        for stream in self.open.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            drop(stream.shutdown(Shutdown::Both));
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::Relaxed);
        self.state.close_all();
        // Wakes the listener; if it is already gone, so much the better.
        drop(TcpStream::connect(self.at));
    }
}

fn carry(state: &Arc<State>, client: &TcpStream) -> Result<()> {
    let server = TcpStream::connect(state.to)?;
    let number = state.accepted.fetch_add(1, Ordering::Relaxed) + 1;
    for stream in [client, &server] {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LOOK))?;
    }
    let mut open = state.open.lock().unwrap_or_else(PoisonError::into_inner);
    open.extend([client.try_clone()?, server.try_clone()?]);
    for (from, to) in [(client.try_clone()?, server.try_clone()?), (server.try_clone()?, client.try_clone()?)] {
        let state = Arc::clone(state);
        thread::spawn(move || copy(&state, number, from, to));
    }
    Ok(())
}

fn copy(state: &State, number: u64, mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        if state.ended.load(Ordering::Relaxed) {
            return;
        }
        let read = from.read(&mut buffer);
        if number <= state.dead_through.load(Ordering::Relaxed) {
            // Whatever came goes nowhere, and nobody is told: both ends stay as they are until the line itself goes.
            while !state.ended.load(Ordering::Relaxed) && !state.cut.load(Ordering::Relaxed) {
                thread::sleep(LOOK);
            }
            return;
        }
        let carried = match read {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => to.write_all(&buffer[..n]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(()),
            Err(e) => Err(e),
        };
        if carried.is_err() {
            // The end of one side is the end of the other.
            drop(from.shutdown(Shutdown::Both));
            drop(to.shutdown(Shutdown::Both));
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that says back what it hears; ends with the test's process.
    fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                thread::spawn(move || {
                    let mut out = stream.try_clone().unwrap();
                    drop(std::io::copy(&mut &stream, &mut out));
                });
            }
        });
        at
    }

    fn asks(stream: &mut TcpStream) -> std::io::Result<()> {
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.write_all(b"word")?;
        let mut back = [0; 4];
        stream.read_exact(&mut back)?;
        assert_eq!(&back, b"word");
        Ok(())
    }

    #[test]
    fn a_line_carries_until_it_is_cut_or_half_open() {
        let line = Line::to(echo()).unwrap();
        let mut first = TcpStream::connect(line.at()).unwrap();
        asks(&mut first).unwrap();
        line.half_open();
        first.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        first.write_all(b"lost").unwrap();
        let kind = first.read(&mut [0]).unwrap_err().kind();
        assert!(matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut), "half-open, not closed: {kind:?}");
        let mut second = TcpStream::connect(line.at()).unwrap();
        asks(&mut second).unwrap();
        assert_eq!(line.accepted(), 2);
        line.cut();
        assert!(asks(&mut second).is_err(), "a cut line carried");
        assert!(asks(&mut TcpStream::connect(line.at()).unwrap()).is_err(), "a cut line took a connection");
        line.mend();
        asks(&mut TcpStream::connect(line.at()).unwrap()).unwrap();
    }
}
