//! A small PostgreSQL client, written from the protocol's documentation: it commits rows over a real network and knows what it was told.
//!
//! Protocol 3.0, simple queries, no password: the server must trust where it comes from. Each wait is limited, for a server whose machine
//! has lost its power says nothing at all.

use anyhow::{Context, Result, bail, ensure};
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

const PROTOCOL: i32 = 3 << 16;
/// A message of a server that is sane; ours ask for little at a time.
const MESSAGE_MAX: usize = 16 << 20;

#[derive(Debug)]
pub struct Client(TcpStream);

impl Client {
    /// As user `postgres` of database `postgres`. The limit holds for the connection and for each later answer.
    pub fn connect(at: SocketAddr, limit: Duration) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&at, limit).with_context(|| format!("connect to {at}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        let mut this = Self(stream);
        let words = b"user\0postgres\0database\0postgres\0\0";
        let mut hello = (8 + words.len() as i32).to_be_bytes().to_vec();
        hello.extend(PROTOCOL.to_be_bytes());
        hello.extend(words);
        this.0.write_all(&hello)?;
        this.until_ready()?;
        Ok(this)
    }

    /// Runs one command and returns its rows, each value as text; a value that is NULL is empty.
    pub fn query(&mut self, sql: &str) -> Result<Vec<Vec<String>>> {
        ensure!(!sql.contains('\0'), "a command with a zero byte");
        let mut message = vec![b'Q'];
        message.extend((5 + sql.len() as i32).to_be_bytes());
        message.extend(sql.bytes().chain([0]));
        self.0.write_all(&message)?;
        self.until_ready().with_context(|| format!("{sql:?}"))
    }

    fn until_ready(&mut self) -> Result<Vec<Vec<String>>> {
        let (mut rows, mut failed) = (Vec::new(), None);
        loop {
            let (kind, body) = self.message()?;
            match kind {
                b'Z' => break,
                b'R' if body.get(..4) == Some(&[0; 4]) => {}
                b'R' => bail!("the server wants a password"),
                b'D' => rows.push(row(&body)?),
                b'E' => {
                    let text = error_text(&body);
                    // Before it is ready for the first time nothing follows.
                    if text.starts_with("FATAL") {
                        bail!("the server says: {text}");
                    }
                    failed = Some(text);
                }
                // Parameters, keys, notices, descriptions of rows, completed commands.
                _ => {}
            }
        }
        match failed {
            Some(text) => bail!("the server says: {text}"),
            None => Ok(rows),
        }
    }

    fn message(&mut self) -> Result<(u8, Vec<u8>)> {
        let mut head = [0; 5];
        self.0.read_exact(&mut head).context("read the server's answer")?;
        let length = i32::from_be_bytes([head[1], head[2], head[3], head[4]]);
        let length = usize::try_from(length).ok().and_then(|l| l.checked_sub(4)).filter(|l| *l <= MESSAGE_MAX);
        let mut body = vec![0; length.with_context(|| format!("a message of kind {} has no sane length", head[0]))?];
        self.0.read_exact(&mut body).context("read the server's answer")?;
        Ok((head[0], body))
    }
}

fn row(body: &[u8]) -> Result<Vec<String>> {
    let short = || "a row that is too short";
    let (count, mut rest) = body.split_first_chunk::<2>().with_context(short)?;
    let mut values = Vec::new();
    for _ in 0..u16::from_be_bytes(*count) {
        let (length, after) = rest.split_first_chunk::<4>().with_context(short)?;
        // Minus one: NULL.
        let length = usize::try_from(i32::from_be_bytes(*length)).unwrap_or(0);
        let (value, after) = after.split_at_checked(length).with_context(short)?;
        values.push(String::from_utf8_lossy(value).into_owned());
        rest = after;
    }
    Ok(values)
}

/// Fields of a letter and a text: `S` says how bad it is, `M` what it is.
fn error_text(body: &[u8]) -> String {
    let fields: Vec<(u8, String)> = body
        .split(|b| *b == 0)
        .filter_map(|f| f.split_first().map(|(kind, text)| (*kind, String::from_utf8_lossy(text).into_owned())))
        .collect();
    let of = |kind: u8| fields.iter().find(|(k, _)| *k == kind).map_or("", |(_, text)| text.as_str());
    format!("{}: {}", of(b'S'), of(b'M'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        [&[kind][..], &(4 + body.len() as i32).to_be_bytes(), body].concat()
    }

    #[test]
    fn rows_and_refusals_are_read_and_a_silent_server_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut hello = [0; 41];
            stream.read_exact(&mut hello).unwrap();
            assert_eq!(hello[..8], [0, 0, 0, 41, 0, 3, 0, 0]);
            stream.write_all(&message(b'R', &[0; 4])).unwrap();
            stream.write_all(&message(b'Z', b"I")).unwrap();
            let mut query = [0; 14];
            stream.read_exact(&mut query).unwrap();
            assert_eq!(&query, b"Q\0\0\0\rselect 1\0");
            let row = [&[0, 2][..], &[0, 0, 0, 1], b"1", &(-1i32).to_be_bytes()].concat();
            stream.write_all(&message(b'D', &row)).unwrap();
            stream.write_all(&message(b'Z', b"I")).unwrap();
            stream.read_exact(&mut query).unwrap();
            stream.write_all(&message(b'E', b"SERROR\0Mno such table\0\0")).unwrap();
            stream.write_all(&message(b'Z', b"I")).unwrap();
            // Nothing more is said.
            let _ = stream.read(&mut query);
            let _ = stream.read(&mut query);
        });
        let mut client = Client::connect(at, Duration::from_millis(500)).unwrap();
        assert_eq!(client.query("select 1").unwrap(), [["1".to_owned(), String::new()]]);
        assert!(format!("{:#}", client.query("select 1").unwrap_err()).contains("ERROR: no such table"));
        assert!(client.query("select 1").is_err());
        drop(client);
        server.join().unwrap();
    }
}
