//! Finding and dialling the box.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpStream},
    os::fd::AsRawFd,
    process::{Command, Stdio},
    time::Duration,
};

/// Per address.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// More addresses of one name are not tried.
const ADDRESSES_MAX: usize = 8;
/// Data that the box does not acknowledge for this long means that the way is cut, also when nothing says so.
const UNACKED_MS: u32 = 15_000;
pub const DEFAULT_PORT: u16 = 7440;

#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("{address:?} is not HOST:PORT")]
    Address { address: String },
    #[error("could not run getent to find the address of {host}")]
    Getent {
        host: String,
        #[source]
        source: io::Error,
    },
    #[error("{host} has no address; check the name, or give an IP address")]
    NoAddress { host: String },
    #[error("could not reach the box at {address}")]
    Connect {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
}

/// Takes `HOST:PORT`, `[v6]:PORT` or just a host (with the usual port) apart.
pub fn split(address: &str) -> Result<(String, u16), DialError> {
    let bad = || DialError::Address { address: address.to_owned() };
    if let Ok(socket) = address.parse::<SocketAddr>() {
        return Ok((socket.ip().to_string(), socket.port()));
    }
    let bare = address.strip_prefix('[').and_then(|a| a.strip_suffix(']')).unwrap_or(address);
    if bare.parse::<IpAddr>().is_ok() {
        return Ok((bare.to_owned(), DEFAULT_PORT));
    }
    let (host, port) = match address.rsplit_once(':') {
        Some((host, port)) => (host, port.parse().map_err(|_| bad())?),
        None => (address, DEFAULT_PORT),
    };
    // What goes to getent as an argument must not look like an option or hold anything odd.
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if host.is_empty() || host.starts_with('-') || !host.chars().all(plain) {
        return Err(bad());
    }
    Ok((host.to_owned(), port))
}

/// Addresses of a host: an IP literal as it is, a name by `getent`. A static binary must not load the C library's name service
/// modules; the tool does, in a process of its own.
pub fn resolve(address: &str) -> Result<Vec<SocketAddr>, DialError> {
    let (host, port) = split(address)?;
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let out = Command::new("getent")
        .args(["ahosts", &host])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .map_err(|source| DialError::Getent { host: host.clone(), source })?;
    let mut found: Vec<SocketAddr> = Vec::new();
    for line in String::from_utf8_lossy(&out.stdout).lines() {
        if let Some(Ok(ip)) = line.split_whitespace().next().map(str::parse::<IpAddr>) {
            let socket = SocketAddr::new(ip, port);
            if !found.contains(&socket) && found.len() < ADDRESSES_MAX {
                found.push(socket);
            }
        }
    }
    if found.is_empty() { Err(DialError::NoAddress { host }) } else { Ok(found) }
}

/// Connects to the first address that answers.
pub fn dial(address: &str) -> Result<TcpStream, DialError> {
    let mut last = None;
    for address in resolve(address)? {
        match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT).and_then(|s| set_up(&s).map(|()| s)) {
            Ok(stream) => return Ok(stream),
            Err(source) => last = Some(DialError::Connect { address, source }),
        }
    }
    Err(last.unwrap_or(DialError::NoAddress { host: address.to_owned() }))
}

fn set_up(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let option = |level: i32, name: i32, value: u32| {
        // SAFETY: a valid descriptor, and a value of the length that is said.
        let done = unsafe {
            libc::setsockopt(stream.as_raw_fd(), level, name, (&raw const value).cast(), size_of::<u32>() as u32)
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    option(libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, UNACKED_MS)?;
    option(libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart() {
        let ok = |a: &str| split(a).unwrap();
        assert_eq!(ok("box.example:9"), ("box.example".to_owned(), 9));
        assert_eq!(ok("box"), ("box".to_owned(), 7440));
        assert_eq!(ok("10.0.0.1"), ("10.0.0.1".to_owned(), 7440));
        assert_eq!(ok("[fe80::1]:5"), ("fe80::1".to_owned(), 5));
        assert_eq!(ok("fe80::1"), ("fe80::1".to_owned(), 7440));
        for bad in ["", ":1", "a:b:c", "box:99999", "-x:1", "a b:1", "$(x):1"] {
            assert!(split(bad).is_err(), "{bad}");
        }
        assert_eq!(resolve("127.0.0.1:7").unwrap(), ["127.0.0.1:7".parse::<SocketAddr>().unwrap()]);
    }
}
