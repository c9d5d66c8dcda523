//! How another hypervisor opens the disks of a run: addresses, and the very words for QEMU and libvirt.

use crate::{App, exports::Export};
use serde_json::{Value, json};
use std::{net::SocketAddr, sync::Arc};
use takeover::{
    plan::{DiskModel, Firmware},
    state::RunState,
};

/// Where `holdfast client-cert` was told to put its files, in the words shown.
const CREDENTIALS: &str = "/etc/pki/holdfast";
/// The name in the box's certificate for NBD.
const TLS_NAME: &str = "holdfast-box";
/// A guest's writes wait so long for a box that starts anew, in seconds.
const RECONNECT_SECONDS: u32 = 3600;

pub fn shown(app: &App, state: &RunState) -> Value {
    let exports: Vec<Arc<Export>> = state.points.iter().flat_map(|p| app.exports.of_group(p.branch)).collect();
    let tls = app.nbd_listen;
    let disks: Vec<Value> = exports
        .iter()
        .map(|e| {
            json!({
                "volume": e.volume_name, "bytes": e.size, "export_name": e.name, "unix_socket": e.socket,
                "tls": tls.filter(|_| e.tcp), "clients": e.clients(),
            })
        })
        .collect();
    json!({
        "disks": disks,
        "client_cert": tls.map(|_| format!("holdfast client-cert hypervisor --out DIR, and DIR's files to {CREDENTIALS} there")),
        "qemu": qemu(&exports, tls, state),
        "libvirt": libvirt(&exports, tls, state),
    })
}

/// An address that stands for all of the box's is not one to dial.
fn dialled(at: SocketAddr) -> (String, u16) {
    let host = if at.ip().is_unspecified() { "ADDRESS-OF-THE-BOX".to_owned() } else { at.ip().to_string() };
    (host, at.port())
}

fn qemu(exports: &[Arc<Export>], tls: Option<SocketAddr>, state: &RunState) -> Vec<String> {
    let size = state.plan.machine.size;
    let mut words = vec!["-smp".into(), size.cpus.to_string(), "-m".into(), format!("{}M", size.memory_mib)];
    if state.plan.machine.firmware == Firmware::Uefi {
        words.extend(["-drive".into(), "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd".into()]);
    }
    if tls.is_some() {
        words.extend(["-object".into(), format!("tls-creds-x509,id=holdfast,endpoint=client,dir={CREDENTIALS}")]);
    }
    if state.plan.machine.disk == DiskModel::Ahci {
        words.extend(["-device".into(), "ich9-ahci,id=ahci".into()]);
    }
    for (i, export) in exports.iter().enumerate() {
        let server = match tls.filter(|_| export.tcp) {
            Some(at) => {
                let (host, port) = dialled(at);
                format!(
                    "server.type=inet,server.host={host},server.port={port},tls-creds=holdfast,tls-hostname={TLS_NAME}"
                )
            }
            None => format!("server.type=unix,server.path={}", export.socket.display().to_string().replace(',', ",,")),
        };
        words.extend([
            "-blockdev".into(),
            format!(
                "driver=nbd,node-name=disk{i},{server},export={},reconnect-delay={RECONNECT_SECONDS},cache.direct=on,discard=unmap",
                export.name.replace(',', ",,")
            ),
        ]);
        // Without a cache of its own, what the guest was told is written is durable on the box.
        let rest = format!("drive=disk{i},write-cache=off");
        let device = match state.plan.machine.disk {
            DiskModel::Virtio => format!("virtio-blk-pci,{rest},werror=stop,rerror=stop"),
            DiskModel::Ahci => format!("ide-hd,bus=ahci.{i},{rest},werror=stop,rerror=stop"),
            DiskModel::Nvme => format!("nvme,serial=holdfast{i},{rest}"),
        };
        words.extend(["-device".into(), device]);
    }
    words
}

/// libvirt keeps the certificate's folder in its qemu.conf (`nbd_tls_x509_cert_dir`).
fn libvirt(exports: &[Arc<Export>], tls: Option<SocketAddr>, state: &RunState) -> String {
    let (bus, letter) = match state.plan.machine.disk {
        DiskModel::Virtio => ("virtio", "vd"),
        DiskModel::Ahci | DiskModel::Nvme => ("sata", "sd"),
    };
    exports.iter().zip('a'..='z').fold(String::new(), |xml, (export, name)| {
        let host = match tls.filter(|_| export.tcp) {
            Some(at) => {
                let (host, port) = dialled(at);
                let open = format!("<source protocol='nbd' name='{}' tls='yes' tlsHostname='{TLS_NAME}'>", escaped(&export.name));
                format!("{open}\n    <host name='{host}' port='{port}'/>\n    <reconnect delay='{RECONNECT_SECONDS}'/>")
            }
            None => {
                let open = format!("<source protocol='nbd' name='{}'>", escaped(&export.name));
                let socket = escaped(&export.socket.display().to_string());
                format!("{open}\n    <host transport='unix' socket='{socket}'/>\n    <reconnect delay='{RECONNECT_SECONDS}'/>")
            }
        };
        format!(
            "{xml}<disk type='network' device='disk'>\n  <driver name='qemu' type='raw' cache='none' discard='unmap' error_policy='stop'/>\n  \
             {host}\n  </source>\n  <target dev='{letter}{name}' bus='{bus}'/>\n</disk>\n"
        )
    })
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\'', "&apos;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_between_quotes_stays_there() {
        assert_eq!(escaped("a'b<c>&"), "a&apos;b&lt;c&gt;&amp;");
        assert_eq!(dialled("0.0.0.0:10809".parse().unwrap()), ("ADDRESS-OF-THE-BOX".into(), 10809));
        assert_eq!(dialled("[2001:db8::1]:1".parse().unwrap()).0, "2001:db8::1");
    }
}
