//! Tokens, certificates, revocation: who gets in.

use crate::{
    agent::{Conn, Identity, dial},
    support::{Control, Inside, wait_for},
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use supervisor::Event;
use wire::{ALPN_ENROL, ALPN_REPLICATION, Message, Purpose, RefuseCode};

fn token(inside: &Inside) -> String {
    inside.ok("POST", "tokens", "")["token"].as_str().unwrap().to_owned()
}

#[test]
fn a_token_enrols_one_host_once() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let inside = Inside::start(&data, "");
    let token = token(&inside);
    // The token carries the fingerprint of the authority, which GET /ca shows.
    let (_, ca) = inside.call("GET", "ca", "");
    let der = CertificateDer::from_pem_slice(ca.as_bytes()).unwrap();
    let print = data_encoding::HEXLOWER.encode(ring::digest::digest(&ring::digest::SHA256, &der).as_ref());
    assert_eq!(token.split_once('.').unwrap().1, &print[..32]);
    assert_eq!(inside.get("status")["ca_fingerprint"].as_str(), Some(&*print));

    let host = Identity::enrol(inside.listen(), &token, "db 1").unwrap();
    assert_eq!(inside.get("hosts")[0]["name"], "db 1");
    let again = Identity::enrol(inside.listen(), &token, "db 2").unwrap_err();
    assert_eq!(again.code, RefuseCode::BadToken, "{again}");
    assert_eq!(inside.events(Event::TokenRefused), 1);

    // With its certificate it gets a control connection.
    let mut control = host.connect(inside.listen(), Purpose::Control).unwrap();
    control.say(&Message::Heartbeat { number: 3, mono_ns: 0 });
    assert_eq!(control.hear().unwrap(), Message::HeartbeatAck { number: 3 });
    wait_for("the host to be shown", || (inside.get("hosts")[0]["connected"] == true).then_some(()));

    // The token stays used after a restart, and the host stays known.
    drop(control);
    inside.stop();
    let inside = Inside::start(&data, "");
    assert_eq!(Identity::enrol(inside.listen(), &token, "db 3").unwrap_err().code, RefuseCode::BadToken);
    host.connect(inside.listen(), Purpose::Control).unwrap();
}

#[test]
fn of_many_that_use_a_token_at_once_one_gets_in() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(&dir.path().join("d"), "");
    for round in 0..3 {
        let token = token(&inside);
        let (at, line) = (inside.listen(), std::sync::Arc::new(std::sync::Barrier::new(6)));
        let runners: Vec<_> = (0..6)
            .map(|i| {
                let (token, line) = (token.clone(), std::sync::Arc::clone(&line));
                std::thread::spawn(move || {
                    line.wait();
                    Identity::enrol(at, &token, &format!("host {round} {i}"))
                })
            })
            .collect();
        let outcomes: Vec<_> = runners.into_iter().map(|r| r.join().unwrap()).collect();
        let refused = outcomes.iter().filter_map(|o| o.as_ref().err());
        assert!(refused.clone().all(|r| r.code == RefuseCode::BadToken), "round {round}: {outcomes:?}");
        assert_eq!(refused.count(), 5, "round {round}: {outcomes:?}");
        assert_eq!(inside.get("hosts").as_array().unwrap().len(), round + 1, "a host more than got in");
    }
}

#[test]
fn tokens_expire_and_nonsense_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(&dir.path().join("d"), "");
    assert_eq!(inside.refused("POST", "tokens", r#"{"valid_minutes":0}"#), "bad-request");
    assert_eq!(inside.refused("POST", "tokens", r#"{"for_ever":true}"#), "bad-request");
    let good = token(&inside);
    assert_eq!(inside.get("tokens").as_array().unwrap().len(), 1);
    for bad in ["", "x", "AAAA.BBBB", &good[..good.len() - 1], &good.replace('.', "")] {
        assert_eq!(Identity::enrol(inside.listen(), bad, "h").unwrap_err().code, RefuseCode::BadToken, "{bad:?}");
    }
    // A request that proves nothing does not cost the token.
    let mut conn = dial(inside.listen(), None, ALPN_ENROL).unwrap();
    conn.hello(Default::default(), Purpose::Enrol, [0; 16]).unwrap();
    conn.say(&Message::Enrol { token: good.clone(), csr_der: vec![1, 2, 3], host_name: "h".into() });
    assert_eq!(conn.hear_refusal().code, RefuseCode::BadRequest);
    Identity::enrol(inside.listen(), &good, "h").unwrap();
}

#[test]
fn a_revoked_host_is_cut_and_kept_out() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let inside = Inside::start(&data, "");
    let host = Identity::enrol(inside.listen(), &token(&inside), "db").unwrap();
    let other = Identity::enrol(inside.listen(), &token(&inside), "web").unwrap();
    let mut control = host.connect(inside.listen(), Purpose::Control).unwrap();
    let mut bystander = other.connect(inside.listen(), Purpose::Control).unwrap();
    inside.ok("POST", "hosts/db/revoke", "");
    assert_eq!(control.hear_refusal().code, RefuseCode::Revoked);
    assert_eq!(host.connect(inside.listen(), Purpose::Control).err().unwrap().code, RefuseCode::Revoked);
    assert_eq!(inside.refused("POST", "hosts/db/revoke", ""), "revoked-already");
    assert_eq!(inside.refused("POST", "hosts/nobody/revoke", ""), "no-such-host");
    bystander.say(&Message::Heartbeat { number: 1, mono_ns: 0 });
    assert_eq!(bystander.hear().unwrap(), Message::HeartbeatAck { number: 1 });
    inside.stop();
    let inside = Inside::start(&data, "");
    assert_eq!(host.connect(inside.listen(), Purpose::Control).err().unwrap().code, RefuseCode::Revoked);
}

#[test]
fn without_a_certificate_of_ours_nobody_gets_in() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(&dir.path().join("d"), "");
    let elsewhere = Inside::start(&dir.path().join("e"), "");
    let foreign = Identity::enrol(elsewhere.listen(), &token(&elsewhere), "h").unwrap();
    // The agent verifies the box: another box's authority is not believed.
    assert!(foreign.dial(inside.listen()).is_err());
    // The box verifies the agent: no certificate, or one of another authority, ends the handshake.
    let before = inside.events(Event::HandshakeFailed);
    for identity in [None, Some(&foreign)] {
        let shaken = dial(inside.listen(), identity, ALPN_REPLICATION).and_then(|mut c| {
            c.try_say(&Message::Heartbeat { number: 1, mono_ns: 0 })?;
            c.try_hear()
        });
        assert!(shaken.is_err(), "{shaken:?}");
    }
    // Nor does a protocol we do not speak, or no TLS at all.
    assert!(dial(inside.listen(), None, b"h2").is_err());
    use std::io::Write as _;
    std::net::TcpStream::connect(inside.listen()).unwrap().write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    wait_for("all four to be noted", || (inside.events(Event::HandshakeFailed) >= before + 4).then_some(()));
    // An enrolment connection can do nothing else.
    let mut conn = dial(inside.listen(), None, ALPN_ENROL).unwrap();
    conn.say(&Message::Hello {
        versions: vec![1],
        agent_version: "t".into(),
        host: Default::default(),
        boot_id: String::new(),
        instance: [0; 16],
        purpose: Purpose::Control,
    });
    assert_eq!(conn.hear_refusal().code, RefuseCode::OutOfPlace);
}

#[test]
fn a_certificate_is_renewed_over_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(&dir.path().join("d"), "");
    let host = Identity::enrol(inside.listen(), &token(&inside), "db").unwrap();
    let mut control = host.connect(inside.listen(), Purpose::Control).unwrap();
    let renewed = host.renew(&mut control);
    drop(control);
    renewed.connect(inside.listen(), Purpose::Control).unwrap();
    assert_eq!(inside.events(Event::HostRenewed), 1);
}

#[test]
fn two_agents_with_one_identity_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let inside = Inside::start(&dir.path().join("d"), "");
    let host = Identity::enrol(inside.listen(), &token(&inside), "db").unwrap();
    let clone = host.of_instance([99; 16]);
    let mut first = host.connect(inside.listen(), Purpose::Control).unwrap();
    let refused = clone.connect(inside.listen(), Purpose::Control).err().unwrap();
    assert_eq!(refused.code, RefuseCode::Duplicate, "{refused}");
    assert_eq!(inside.events(Event::DuplicateAgent), 1);
    // The same agent coming again replaces its own half-open connection.
    let mut second = host.connect(inside.listen(), Purpose::Control).unwrap();
    assert_eq!(first.hear_refusal().code, RefuseCode::Duplicate);
    second.say(&Message::Heartbeat { number: 1, mono_ns: 0 });
    assert_eq!(second.hear().unwrap(), Message::HeartbeatAck { number: 1 });
    // Silent for its timeout, it is closed, and the other may take over.
    assert_eq!(second.hear_refusal().code, RefuseCode::Silent);
    assert_eq!(inside.events(Event::HostSilent), 1);
    let mut third: Conn = wait_for("the place to be free", || clone.connect(inside.listen(), Purpose::Control).ok());
    third.say(&Message::Heartbeat { number: 1, mono_ns: 0 });
    assert_eq!(third.hear().unwrap(), Message::HeartbeatAck { number: 1 });
}

#[test]
fn the_box_does_not_make_a_second_authority() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let inside = Inside::start(&data, "");
    Identity::enrol(inside.listen(), &token(&inside), "db").unwrap();
    inside.stop();
    let saved = std::fs::read(data.join("ca/ca.key")).unwrap();
    std::fs::remove_file(data.join("ca/ca.key")).unwrap();
    let refused = Inside::try_start(&data, "").err().unwrap();
    assert!(refused.contains("ca.key") && refused.contains("backup"), "{refused}");
    std::fs::write(data.join("ca/ca.key"), saved).unwrap();
    Inside::start(&data, "");
}
