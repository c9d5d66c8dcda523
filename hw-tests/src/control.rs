//! The box's control API: HTTP/1.1 with JSON over its unix socket, one request per connection.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

/// An answer that takes longer means a hung box.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Largest answer taken; a list of points of a long history is the biggest.
const ANSWER_MAX: u64 = 256 << 20;

/// Where a box listens for its administrator.
#[derive(Clone, Debug)]
pub struct Control {
    socket: PathBuf,
}

/// What the box refused, in its own words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub status: u16,
    pub code: String,
    pub message: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}, HTTP {})", self.message, self.code, self.status)
    }
}
impl std::error::Error for Refused {}

impl Control {
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }
    pub fn socket(&self) -> &Path {
        &self.socket
    }
    pub fn get(&self, path: &str) -> Result<Value> {
        self.call("GET", path, None)
    }
    pub fn post(&self, path: &str, body: &Value) -> Result<Value> {
        self.call("POST", path, Some(body))
    }
    pub fn delete(&self, path: &str) -> Result<Value> {
        self.call("DELETE", path, None)
    }

    /// One call below `/api/v1`; an answer of lines is returned as an array.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        self.exchange(method, path, body).with_context(|| format!("{method} {path}"))
    }

    fn exchange(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let mut stream =
            UnixStream::connect(&self.socket).with_context(|| format!("connect {}", self.socket.display()))?;
        stream.set_read_timeout(Some(SILENCE_MAX))?;
        stream.set_write_timeout(Some(SILENCE_MAX))?;
        let body = body.map(Value::to_string).unwrap_or_default();
        let head = format!(
            "{method} /api/v1{path} HTTP/1.1\r\nHost: box\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(body.as_bytes())?;
        let (status, text) = read_answer(BufReader::new(stream))?;
        let value = parse_body(&text)?;
        if (200..300).contains(&status) {
            return Ok(value);
        }
        let error = &value["error"];
        let text_of = |key: &str| error[key].as_str().unwrap_or("").to_owned();
        bail!(Refused { status, code: text_of("code"), message: text_of("message") })
    }
}

fn parse_body(text: &str) -> Result<Value> {
    if text.trim().is_empty() {
        return Ok(Value::Null);
    }
    if let Ok(value) = serde_json::from_str(text) {
        return Ok(value);
    }
    let lines: serde_json::Result<Vec<Value>> =
        text.lines().filter(|l| !l.trim().is_empty()).map(serde_json::from_str).collect();
    lines
        .map(Value::Array)
        .with_context(|| format!("answer is not JSON: {}", text.chars().take(200).collect::<String>()))
}

/// Reads status and body; the body ends by length, by chunks or with the connection.
fn read_answer(mut reader: impl BufRead) -> Result<(u16, String)> {
    let mut line = String::new();
    reader.read_line(&mut line).context("read the answer")?;
    let status: u16 = line
        .split_whitespace()
        .nth(1)
        .and_then(|s| s.parse().ok())
        .with_context(|| format!("no HTTP answer: {line:?}"))?;
    let (mut length, mut chunked) = (None, false);
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        let Some((key, value)) = line.split_once(':') else { continue };
        match key.to_ascii_lowercase().as_str() {
            "content-length" => length = Some(value.trim().parse::<u64>().context("content-length")?),
            "transfer-encoding" => chunked = value.trim().eq_ignore_ascii_case("chunked"),
            _ => {}
        }
    }
    let mut body = Vec::new();
    if chunked {
        loop {
            line.clear();
            reader.read_line(&mut line)?;
            let size = line.trim().split(';').next().unwrap_or("");
            let size = u64::from_str_radix(size, 16).with_context(|| format!("chunk size {size:?}"))?;
            if size == 0 {
                break;
            }
            if body.len() as u64 + size > ANSWER_MAX {
                bail!("the answer is longer than {ANSWER_MAX} bytes");
            }
            let got = (&mut reader).take(size).read_to_end(&mut body)?;
            if got as u64 != size {
                bail!("the answer was cut short");
            }
            line.clear();
            reader.read_line(&mut line)?;
        }
    } else {
        let want = length.unwrap_or(ANSWER_MAX);
        reader.take(want.min(ANSWER_MAX)).read_to_end(&mut body)?;
        if length.is_some_and(|l| l != body.len() as u64) {
            bail!("the answer was cut short");
        }
    }
    Ok((status, String::from_utf8(body).context("the answer is not UTF-8")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_by_length_by_chunks_and_to_the_end() {
        let answers = [
            "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n{\"a\":1}",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{\"a\r\n4\r\n\":1}\r\n0\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\n{\"a\":1}",
        ];
        for answer in answers {
            let (status, body) = read_answer(answer.as_bytes()).unwrap();
            assert_eq!((status, body.as_str()), (200, "{\"a\":1}"), "{answer:?}");
        }
    }

    #[test]
    fn an_answer_cut_short_is_an_error() {
        for answer in [
            "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{}",
            "",
        ] {
            assert!(read_answer(answer.as_bytes()).is_err(), "{answer:?}");
        }
    }

    #[test]
    fn a_body_of_lines_becomes_an_array() {
        assert_eq!(parse_body("{\"a\":1}\n{\"b\":2}\n").unwrap(), serde_json::json!([{"a":1},{"b":2}]));
        assert_eq!(parse_body(" ").unwrap(), Value::Null);
        assert!(parse_body("no").is_err());
    }
}
