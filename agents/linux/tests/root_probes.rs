//! Probes against real servers, and scripts that do what they should not.

mod common;

use agent_linux::{
    config::Config,
    probes::{Made, Means, make, script::Runner},
};
use common::{agent::BIN, root};
use std::{
    fs::{self, File},
    net::{SocketAddr, TcpListener},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use wire::{PROBE_OUTPUT_MAX, PlanProbe, ProbeEnd, ProbeKind};

/// Nothing here takes this long; a machine that is busy may.
const PATIENCE: Duration = Duration::from_secs(60);

fn probe(kind: ProbeKind, timeout_ms: u64) -> PlanProbe {
    PlanProbe { name: "p".into(), kind, every_ms: 1_000, timeout_ms }
}
fn means(config: &Config) -> Means {
    let runner =
        Runner { socket: "/nonexistent/socket".into(), program: BIN.into(), config: config.loaded_from.clone() };
    Means { systemctl: "systemctl".into(), scripts: config.scripts.clone(), runner }
}
fn ask(kind: &ProbeKind, timeout_ms: u64) -> ProbeEnd {
    make(&probe(kind.clone(), timeout_ms), &means(&Config::default())).end
}
fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// A server of another program's; ended with the test.
struct Server {
    child: Child,
    kind: ProbeKind,
    log: PathBuf,
}

impl Server {
    fn start(mut command: Command, kind: ProbeKind, log: PathBuf) -> Self {
        let out = File::create(&log).unwrap();
        let child = command.stdin(Stdio::null()).stdout(out.try_clone().unwrap()).stderr(out).spawn().unwrap();
        let mut this = Self { child, kind, log };
        let begun = Instant::now();
        while ask(&this.kind, 5_000) != ProbeEnd::Works {
            let ended = this.child.try_wait().unwrap();
            assert!(
                ended.is_none() && begun.elapsed() < PATIENCE,
                "{:?}: {:?} {}",
                this.kind,
                ask(&this.kind, 5_000),
                this.said()
            );
            thread::sleep(Duration::from_millis(50));
        }
        this
    }
    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
    fn signal(&self, signal: i32) {
        // SAFETY: a process that we started and have not waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }
    /// It hangs, it goes on, it dies: each is seen for what it is.
    fn dies_visibly(mut self, what: &str) {
        self.signal(libc::SIGSTOP);
        let ProbeEnd::Fails { why } = ask(&self.kind, 300) else { panic!("{what} is stopped and works") };
        assert!(why.contains("gave no whole answer within 300 ms"), "{what}: {why}");
        self.signal(libc::SIGCONT);
        let begun = Instant::now();
        while ask(&self.kind, 5_000) != ProbeEnd::Works {
            assert!(begun.elapsed() < PATIENCE, "{what} does not go on: {}", self.said());
        }
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let ProbeEnd::Fails { why } = ask(&self.kind, 5_000) else { panic!("{what} is dead and works") };
        assert!(why.starts_with("nobody accepts connections at "), "{what}: {why}");
        println!("{what} was asked");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn has(program: &str) -> bool {
    let found = Command::new("sh").args(["-c", "command -v \"$1\"", "sh", program]).stdout(Stdio::null()).status();
    let found = found.is_ok_and(|s| s.success());
    if !found {
        println!("SKIPPED: probes of {program}: it is not installed");
    }
    found
}

/// A folder that a server's own user may enter.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("hf-srv-").tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    dir
}

#[test]
fn root_postgresql_is_asked_a_query_and_for_a_password() {
    if !root("root_postgresql_is_asked_a_query_and_for_a_password") {
        return;
    }
    let mut versions: Vec<PathBuf> =
        fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten().map(|e| e.path().join("bin")).collect();
    versions.sort();
    let Some(bin) = versions.pop() else {
        println!("SKIPPED: probes of PostgreSQL: it is not installed");
        return;
    };
    let dir = folder();
    let data = dir.path().join("data");
    let as_postgres = |program: &Path| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]).arg(program).current_dir("/");
        command
    };
    let mut init = as_postgres(&bin.join("initdb"));
    init.args(["--auth=trust", "--no-sync", "--no-locale", "--encoding=UTF8", "-D"]).arg(&data);
    let out = init.output().unwrap();
    assert!(out.status.success(), "initdb: {}", String::from_utf8_lossy(&out.stderr));
    let at = free();
    let mut command = as_postgres(&bin.join("postgres"));
    command.arg("-D").arg(&data).arg("-p").arg(at.port().to_string());
    command.args(["-c", "listen_addresses=127.0.0.1", "-c", "shared_buffers=8MB", "-c", "fsync=off", "-c"]);
    command.arg(format!("unix_socket_directories={}", dir.path().display()));
    // Trusted, but there is no such user: it has understood us.
    let server = Server::start(command, ProbeKind::Postgres { address: at.to_string() }, dir.path().join("log"));
    assert!(server.said().contains("role \"holdfast\" does not exist"), "{}", server.said());
    let sql = |text: &str| {
        let mut psql = as_postgres(Path::new("psql"));
        psql.args(["-XqAt", "-d", "postgres", "-h"]).arg(dir.path()).args(["-p", &at.port().to_string(), "-c", text]);
        let out = psql.output().unwrap();
        assert!(out.status.success(), "{text}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    };
    // Let in, it is asked a query; that there was one, its own log says.
    sql("create role holdfast login");
    sql("alter system set log_statement = 'all'");
    sql("select pg_reload_conf()");
    let begun = Instant::now();
    while !server.said().contains("statement: SELECT 1") {
        assert_eq!(ask(&server.kind, 5_000), ProbeEnd::Works, "{}", server.said());
        assert!(begun.elapsed() < PATIENCE, "no query came: {}", server.said());
    }
    // Where a password is asked for, that is the answer.
    fs::write(data.join("pg_hba.conf"), "local all all trust\nhost all all all scram-sha-256\n").unwrap();
    sql("select pg_reload_conf()");
    assert_eq!(ask(&server.kind, 5_000), ProbeEnd::Works, "{}", server.said());
    // Full: it says so itself.
    sql("alter role holdfast connection limit 0");
    fs::write(data.join("pg_hba.conf"), "local all all trust\nhost all all all trust\n").unwrap();
    sql("select pg_reload_conf()");
    let begun = Instant::now();
    loop {
        match ask(&server.kind, 5_000) {
            ProbeEnd::Fails { why } if why.contains("too many connections for role \"holdfast\" (53300)") => break,
            end => assert!(begun.elapsed() < PATIENCE, "{end:?}"),
        }
    }
    sql("alter role holdfast connection limit 9");
    server.dies_visibly("PostgreSQL");
}

#[test]
fn root_redis_mariadb_and_web_servers_are_asked() {
    if !root("root_redis_mariadb_and_web_servers_are_asked") {
        return;
    }
    let dir = folder();
    // The server is in this program too, by its name: the package of the tools brings no service.
    if has("redis-check-rdb") {
        let at = free();
        let redis = |more: &[&str]| {
            let mut command = Command::new("redis-check-rdb");
            command.arg0("redis-server").args(["--port", &at.port().to_string(), "--bind", "127.0.0.1", "--save", ""]);
            command.args(more).current_dir(dir.path());
            Server::start(command, ProbeKind::Redis { address: at.to_string() }, dir.path().join("redis.log"))
        };
        redis(&[]).dies_visibly("Redis");
        redis(&["--requirepass", "secret"]).dies_visibly("Redis with a password");
    }
    if has("mariadbd") && has("my_print_defaults") {
        let at = free();
        let data = dir.path().join("maria");
        let out = Command::new("mariadb-install-db")
            .args(["--user=root", "--auth-root-authentication-method=normal", "--skip-test-db"])
            .arg(format!("--datadir={}", data.display()))
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
        let mut command = Command::new("mariadbd");
        command.args(["--no-defaults", "--user=root", "--bind-address=127.0.0.1"]);
        command.arg(format!("--datadir={}", data.display())).arg(format!("--port={}", at.port()));
        command.arg(format!("--socket={}", dir.path().join("maria.sock").display()));
        command.arg(format!("--pid-file={}", dir.path().join("maria.pid").display()));
        let init = dir.path().join("init.sql");
        fs::write(
            &init,
            "CREATE USER IF NOT EXISTS holdfast@localhost; CREATE USER IF NOT EXISTS holdfast@127.0.0.1;\n",
        )
        .unwrap();
        let kind = ProbeKind::Mysql { address: at.to_string() };
        let with = |more: Option<String>| {
            let mut with = Command::new(command.get_program());
            with.args(command.get_args()).args(more);
            Server::start(with, kind.clone(), dir.path().join("maria.log"))
        };
        // Refused, and let in.
        with(None).dies_visibly("MariaDB that does not know us");
        with(Some(format!("--init-file={}", init.display()))).dies_visibly("MariaDB that lets us in");
    }
    if has("busybox") {
        let at = free();
        fs::write(dir.path().join("index.html"), "it works").unwrap();
        let mut command = Command::new("busybox");
        command.args(["httpd", "-f", "-p", &at.to_string(), "-h"]).arg(dir.path());
        let address = at.to_string();
        let kind = |path: &str| ProbeKind::Http { address: address.clone(), path: path.into() };
        let server = Server::start(command, kind("/index.html"), dir.path().join("httpd.log"));
        let missing = ProbeEnd::Fails { why: format!("{address} answers 404 Not Found") };
        assert_eq!(ask(&kind("/nothing"), 5_000), missing);
        server.dies_visibly("a web server");
    }
    if has("openssl") {
        let at = free();
        let made = rcgen::generate_simple_self_signed(vec!["www.example".to_owned()]).unwrap();
        let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
        fs::write(&cert, made.cert.pem()).unwrap();
        fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        let tls = |more: &[&str]| {
            let mut command = Command::new("openssl");
            command
                .args(["s_server", "-quiet", "-WWW", "-accept", &at.to_string(), "-cert"])
                .arg(&cert)
                .arg("-key")
                .arg(&key);
            command.args(more).current_dir(dir.path());
            command
        };
        let address = at.to_string();
        let kind = |path: &str, name: Option<&str>| ProbeKind::Https {
            address: address.clone(),
            path: path.into(),
            name: name.map(str::to_owned),
        };
        let server = Server::start(tls(&[]), kind("/index.html", None), dir.path().join("tls.log"));
        assert_eq!(ask(&kind("/index.html", Some("www.example")), 5_000), ProbeEnd::Works);
        // Spoken to without TLS it is no web server.
        assert_ne!(
            ask(&ProbeKind::Http { address: address.clone(), path: "/index.html".into() }, 5_000),
            ProbeEnd::Works
        );
        server.dies_visibly("a web server with TLS");
        let mut old =
            tls(&["-tls1_2"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let begun = Instant::now();
        let end = loop {
            match ask(&kind("/index.html", None), 5_000) {
                ProbeEnd::Fails { why } if why.contains("nobody accepts") && begun.elapsed() < PATIENCE => {}
                end => break end,
            }
        };
        old.kill().unwrap();
        old.wait().unwrap();
        let ProbeEnd::Broken { why } = end else { panic!("{end:?}") };
        assert!(why.contains("speaks no TLS 1.3"), "{why}");
    }
}

/// Scripts of a configuration, in a folder that everybody may enter.
struct Scripts {
    dir: tempfile::TempDir,
    config: Config,
}

impl Scripts {
    fn new(all: &[(&str, &str)], user: &str, more: &str) -> Self {
        let dir = folder();
        let mut text = format!("state_dir = {:?}\n", dir.path());
        for (name, script) in all {
            let file = dir.path().join(name);
            fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
            text += &format!(
                "[scripts.{name}]\nprogram = {file:?}\narguments = [\"one\", \"two words\"]\nuser = \"{user}\"\n{more}\n"
            );
        }
        let at = dir.path().join("config.toml");
        fs::write(&at, text).unwrap();
        Self { config: Config::load(Some(&at)).unwrap(), dir }
    }
    fn run(&self, name: &str, timeout_ms: u64) -> Made {
        make(&probe(ProbeKind::Script(name.into()), timeout_ms), &means(&self.config))
    }
}

/// Processes with this word on their command line.
fn alive(word: &str) -> usize {
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter(|e| {
        let line = fs::read(e.path().join("cmdline")).unwrap_or_default();
        line.split(|b| *b == 0).any(|w| w == word.as_bytes())
    })
    .count()
}

#[test]
fn root_a_script_runs_as_its_user_and_its_end_is_told() {
    if !root("root_a_script_runs_as_its_user_and_its_end_is_told") {
        return;
    }
    let scripts = Scripts::new(
        &[
            ("good", "id -un; id -Gn; pwd; echo \"$2\"; env | sort | cut -d= -f1 | tr '\\n' ' '; echo err >&2"),
            ("bad", "echo 'no orders'; exit 3"),
            ("killed", "kill -KILL $$"),
            ("steers", "printf '\\033[2Jgone\\r\\n\\377'; exit 1"),
        ],
        "nobody",
        "",
    );
    let good = scripts.run("good", 20_000);
    assert_eq!(good.end, ProbeEnd::Works, "{good:?}");
    let said: Vec<&str> = good.output.lines().collect();
    assert_eq!(said[..4], ["nobody", "nogroup", "/", "two words"], "{said:?}");
    assert_eq!(said[4], "HOME LOGNAME PATH PWD SHELL USER err", "{said:?}");
    let fails = |made: Made| match made.end {
        ProbeEnd::Fails { why } => (why, made.output),
        end => panic!("{end:?}"),
    };
    assert_eq!(fails(scripts.run("bad", 20_000)), ("script bad ended with 3: no orders".into(), "no orders".into()));
    assert_eq!(fails(scripts.run("killed", 20_000)).0, "script killed was ended by SIGKILL");
    assert_eq!(fails(scripts.run("steers", 20_000)).1, "\u{fffd}[2Jgone \n\u{fffd}");
    let broken = |made: Made| match made.end {
        ProbeEnd::Broken { why } => why,
        end => panic!("{end:?}"),
    };
    assert_eq!(broken(scripts.run("none", 20_000)), "this host's configuration has no [scripts.none]");
    let nobody = Scripts::new(&[("good", "true")], "hf-no-such-user", "");
    assert!(broken(nobody.run("good", 20_000)).contains("there is no such user"));
    fs::set_permissions(scripts.dir.path().join("bad"), fs::Permissions::from_mode(0o700)).unwrap();
    assert!(broken(scripts.run("bad", 20_000)).contains("Permission denied"));
    fs::remove_file(scripts.dir.path().join("good")).unwrap();
    assert!(broken(scripts.run("good", 20_000)).contains("No such file"));
}

#[test]
fn root_nothing_of_a_script_outlives_its_limit() {
    if !root("root_nothing_of_a_script_outlives_its_limit") {
        return;
    }
    // A number of seconds that is nobody else's, to know its processes by.
    let word = format!("{}", 100_000 + std::process::id());
    let sleep = format!("sleep {word}");
    let stubborn = format!("trap '' TERM INT HUP; echo begun; while :; do {sleep}; done");
    let escapes = format!("setsid sh -c 'trap \"\" TERM; ({sleep}) & {sleep}' & setsid setsid {sleep} & echo begun");
    let leaves = format!("{escapes}; exit 0");
    let hangs = format!("{escapes}; {sleep}");
    let many = format!("i=0; while [ $i -lt 150 ]; do i=$((i+1)); {sleep} & done; echo begun; wait");
    let all = [
        ("stubborn", stubborn.as_str()),
        ("leaves", &leaves),
        ("hangs", &hangs),
        ("many", &many),
        ("floods", "yes 'a line of the flood'"),
        ("polite", &format!("trap 'echo bye; exit 0' TERM; echo begun; {sleep} & wait")),
    ];
    let scripts = Scripts::new(&all, "nobody", "limit_ms = 1500");
    let too_long = |made: &Made, name: &str, ms: u64| {
        let ProbeEnd::Fails { why } = &made.end else { panic!("{made:?}") };
        assert!(why.starts_with(&format!("script {name} took longer than {ms} ms and was killed: ")), "{why}");
    };
    for name in ["stubborn", "hangs", "many"] {
        let made = scripts.run(name, 60_000);
        too_long(&made, name, 1_500);
        assert_eq!((made.output.as_str(), alive(&word)), ("begun", 0), "{name}");
    }
    // The plan's limit, as it is the lower one.
    let made = scripts.run("floods", 700);
    too_long(&made, "floods", 700);
    assert!(
        made.output.starts_with("a line of the flood\na line") && made.output.len() <= PROBE_OUTPUT_MAX,
        "{}",
        made.output.len()
    );
    assert!(made.output.len() > PROBE_OUTPUT_MAX / 2);
    // What ends well when it is told to has taken too long all the same.
    let made = scripts.run("polite", 60_000);
    too_long(&made, "polite", 1_500);
    assert_eq!(made.output, "begun\nbye");
    // Good, and what it left behind is gone.
    let made = scripts.run("leaves", 60_000);
    assert_eq!((made.end, made.output.as_str(), alive(&word)), (ProbeEnd::Works, "begun", 0));
}

#[test]
fn root_the_guards_socket_is_asked_first() {
    if !root("root_the_guards_socket_is_asked_first") {
        return;
    }
    // As systemd does for each connection: the guard's input and output are the connection.
    let scripts = Scripts::new(&[("who", "id -un")], "nobody", "");
    let socket = scripts.dir.path().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let config = scripts.config.loaded_from.clone().unwrap();
    let guards = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let output = std::os::fd::OwnedFd::from(stream.try_clone().unwrap());
        let mut guard = Command::new(BIN);
        guard.arg("--config").arg(config).arg("script-guard").stdin(std::os::fd::OwnedFd::from(stream)).stdout(output);
        let mut started = guard.spawn().unwrap();
        // With our copies of the connection, whose end is the answer's.
        drop(guard);
        assert!(started.wait().unwrap().success());
        // The second one says nothing, and goes.
        drop(listener.accept().unwrap());
        // The third one says what it should not.
        let (mut stream, _) = listener.accept().unwrap();
        std::io::Write::write_all(&mut stream, b"{\"end\":\"Works\"").unwrap();
    });
    let runner = Runner { socket, program: "/nonexistent".into(), config: None };
    let means = Means { runner, ..means(&scripts.config) };
    let ask = || make(&probe(ProbeKind::Script("who".into()), 20_000), &means);
    let made = ask();
    assert_eq!((made.end, made.output.as_str()), (ProbeEnd::Works, "nobody"));
    for _ in 0..2 {
        let made = ask();
        assert!(matches!(&made.end, ProbeEnd::Broken { why } if why.contains("no answer of the guard")), "{made:?}");
    }
    guards.join().unwrap();
}
