//! Static files, built in.

use crate::{Answer, respond};
use http::{HeaderValue, StatusCode, header};
use ring::digest;
use std::sync::OnceLock;

struct Asset {
    name: &'static str,
    kind: &'static str,
    data: &'static [u8],
}

macro_rules! asset {
    ($name:literal, $kind:literal) => {
        Asset { name: $name, kind: $kind, data: include_bytes!(concat!("../../../ui-templates/static/", $name)) }
    };
}

static ASSETS: [Asset; 6] = [
    asset!("holdfast.css", "text/css; charset=utf-8"),
    asset!("holdfast.js", "text/javascript; charset=utf-8"),
    asset!("htmx.min.js", "text/javascript; charset=utf-8"),
    asset!("htmx-sse.min.js", "text/javascript; charset=utf-8"),
    asset!("mark.svg", "image/svg+xml"),
    asset!("LICENSES.txt", "text/plain; charset=utf-8"),
];

/// Of all files together: part of their addresses, so that they may be kept for ever and a new version is a new address.
pub fn version() -> &'static str {
    static VERSION: OnceLock<String> = OnceLock::new();
    VERSION.get_or_init(|| {
        let mut all = digest::Context::new(&digest::SHA256);
        ASSETS.iter().for_each(|a| all.update(a.data));
        data_encoding::HEXLOWER.encode(&all.finish().as_ref()[..6])
    })
}

/// `/static/VERSION/NAME`.
pub fn serve(name: &str) -> Answer {
    let Some(asset) = ASSETS.iter().find(|a| a.name == name) else {
        return respond::plain(StatusCode::NOT_FOUND, "there is no such file\n");
    };
    let mut answer = respond::bytes(StatusCode::OK, asset.kind, asset.data);
    let keep = HeaderValue::from_static("public, max-age=31536000, immutable");
    answer.headers_mut().insert(header::CACHE_CONTROL, keep);
    answer
}
