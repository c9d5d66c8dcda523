//! The commands: which does what, and those that are one request and one answer.

use crate::{
    Outcome, api,
    args::{
        Args, AtBound, BookmarkCommand, BookmarkConsistency, ClientCertArgs, Command, GroupCommand, HostCommand, Mode,
        PointsArgs, PolicyArgs, StatusArgs, VerifyArgs, ViewCommand, WebCommand,
    },
    client::{Client, Route},
    offline,
    picture::{Canvas, Table, count},
    points, restore,
    status::{LagHistory, hosts_table, policy_lines, render},
    takeover,
    times::{Clock, show_span_us},
    watch,
};
use anyhow::Context as _;
use http::Method;
use model::{Bound, ByteLen, GroupPolicy, RecoveryPoint, SyncMode, VolumeSpec};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::{
    fs::{DirBuilder, OpenOptions},
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

const DEFAULT_SOCKET: &str = "/var/lib/holdfast/run/control.sock";

pub fn run(args: Args) -> anyhow::Result<Outcome> {
    let socket = args
        .socket
        .or_else(|| std::env::var_os("HOLDFAST_SOCKET").map(PathBuf::from))
        .unwrap_or_else(|| DEFAULT_SOCKET.into());
    let client = || Client::new(&socket);
    match args.command {
        Command::Status(args) => status(&client()?, &args),
        Command::Host(command) => host(&client()?, command),
        Command::Group(command) => group(&client()?, command),
        Command::Points(args) => show_points(&client()?, &args),
        Command::Bookmark(command) => bookmark(&client()?, command),
        Command::View(command) => view(&client()?, command),
        Command::Restore(args) => restore::run(&client()?, &args),
        Command::Verify(VerifyArgs { journal: Some(dir), json, .. }) => return offline::verify(&dir, json),
        Command::Verify(args) => return verify(&client()?, &args),
        Command::Inspect(args) => return offline::inspect(&args),
        Command::Export(args) => offline::export(&args),
        Command::ClientCert(args) => client_cert(&client()?, &args),
        Command::Plan(command) => takeover::plan(&client()?, command),
        Command::Failback(args) => takeover::failback(&client()?, &args),
        Command::Takeover(args) => takeover::takeover(&client()?, &args),
        Command::Migrate(args) => takeover::migrate(&client()?, &args),
        Command::Drill(args) => takeover::drill(&client()?, &args),
        Command::Run(command) => takeover::run(&client()?, command),
        Command::Web(command) => web(&client()?, command),
    }
    .map(|()| Outcome::Done)
}

fn web(client: &Client, command: WebCommand) -> anyhow::Result<()> {
    let text = |answer: &Value, name: &str| answer[name].as_str().unwrap_or_default().to_owned();
    match command {
        WebCommand::SetupCode => {
            let made: Value = client.call(Method::POST, &Route::new(&["web", "setup-code"]), None)?;
            let place = match made["listen"].as_str() {
                Some(listen) => format!("open https://{} and give this code", listen.replace("0.0.0.0", "THIS-BOX")),
                None => "the box serves no pages: set [web] listen in its configuration; the code is".to_owned(),
            };
            print(&format!("{place}; it works once, for {} minutes:\n\n  {}\n", made["minutes"], text(&made, "code")))
        }
        WebCommand::ResetPassword { name } => {
            let route = Route::new(&["web", "reset-password"]);
            let made: Value = client.call(Method::POST, &route, Some(&json!({ "name": name })))?;
            print(&format!("the new password of {name}, shown once:\n\n  {}\n", text(&made, "password")))
        }
    }
}

/// A name that fits nothing or too much.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChoiceError {
    #[error("the box has no protection group yet")]
    NoGroups,
    #[error("the box has several protection groups")]
    WhichGroup { have: Vec<String> },
    #[error("the box has no protection group {text:?}")]
    NoSuchGroup { text: String, have: Vec<String> },
    #[error("group {group} has several volumes")]
    WhichVolume { group: String, have: Vec<String> },
    #[error("group {group} has no volume {text:?}")]
    NoSuchVolume { group: String, text: String, have: Vec<String> },
    #[error("{text:?} is no size")]
    Size { text: String },
    #[error("{text:?} names no volume and its size")]
    VolumeAndSize { text: String },
}

impl ChoiceError {
    pub fn remedy(&self) -> String {
        match self {
            Self::NoGroups => {
                "protect a disk first: `holdfast-agent protect` on a host, or `holdfast group create`".into()
            }
            Self::WhichGroup { have } | Self::NoSuchGroup { have, .. } => format!("name one of {}", have.join(", ")),
            Self::WhichVolume { have, .. } | Self::NoSuchVolume { have, .. } => {
                format!("name one with --volume: {}", have.join(", "))
            }
            Self::Size { .. } => "write a number of bytes or one with a unit: 512MiB, 40GiB, 2TiB".into(),
            Self::VolumeAndSize { .. } => "write it like system:40GiB; the size is a multiple of 512 bytes".into(),
        }
    }
}

pub fn groups(client: &Client) -> anyhow::Result<Vec<api::Group>> {
    list(client.get(&Route::new(&["groups"]))?, "groups")
}

/// A list, bare or under its name.
fn list<T: DeserializeOwned>(mut answer: Value, name: &str) -> anyhow::Result<Vec<T>> {
    let list = match answer.get_mut(name) {
        Some(list) => list.take(),
        None => answer,
    };
    serde_json::from_value(list).with_context(|| format!("holdfastd's list of {name} is not understood"))
}

/// The group of that name or id; without one, the only group.
pub fn pick_group<'a>(groups: &'a [api::Group], wanted: Option<&str>) -> Result<&'a api::Group, ChoiceError> {
    let have = || groups.iter().map(|group| group.name.clone()).collect();
    match (wanted, groups) {
        (_, []) => Err(ChoiceError::NoGroups),
        (None, [only]) => Ok(only),
        (None, _) => Err(ChoiceError::WhichGroup { have: have() }),
        (Some(text), _) => groups
            .iter()
            .find(|group| group.name == text || group.id == text)
            .ok_or_else(|| ChoiceError::NoSuchGroup { text: text.to_owned(), have: have() }),
    }
}

/// The volume of that name or number; without one, the only volume.
pub fn pick_volume<'a>(
    volumes: &'a [VolumeSpec],
    group: &str,
    wanted: Option<&str>,
) -> Result<&'a VolumeSpec, ChoiceError> {
    let group = group.to_owned();
    let have = || volumes.iter().map(|volume| volume.name.clone()).collect();
    match (wanted, volumes) {
        (None, [only]) => Ok(only),
        (None, _) => Err(ChoiceError::WhichVolume { group, have: have() }),
        (Some(text), _) => {
            // A name first: a volume may be called "1".
            let named = volumes.iter().find(|volume| volume.name == text);
            named
                .or_else(|| volumes.iter().find(|volume| volume.id.to_string() == text))
                .ok_or_else(|| ChoiceError::NoSuchVolume { group, text: text.to_owned(), have: have() })
        }
    }
}

pub fn open_view(
    client: &Client,
    group: &api::Group,
    point: &RecoveryPoint,
    wish: &ViewWish,
) -> Result<api::View, crate::client::ApiError> {
    client.call(Method::POST, &Route::new(&["groups", id_of(group), "views"]), Some(&wish.body(point)))
}

/// How a view is to be opened, beside the moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct ViewWish {
    pub tcp: bool,
    /// None: what the box is set to.
    pub idle_minutes: Option<u64>,
}

impl ViewWish {
    fn body(&self, point: &RecoveryPoint) -> Value {
        let me = format!("holdfast (process {})", std::process::id());
        let mut body = json!({ "at": point, "tcp": self.tcp, "opened_by": me });
        if let Some(minutes) = self.idle_minutes {
            body["idle_minutes"] = minutes.into();
        }
        body
    }
}

/// The id where there is one: a name may have changed since it was listed.
fn id_of(group: &api::Group) -> &str {
    if group.id.is_empty() { &group.name } else { &group.id }
}

/// An id that may come as a number or a text.
pub fn plain(id: &Value) -> String {
    id.as_str().map_or_else(|| id.to_string(), str::to_owned)
}

pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

pub fn print_json(value: &Value) -> anyhow::Result<()> {
    print(&format!("{value:#}\n"))
}

pub fn print_table(table: &Table, empty: &str, rows: usize) -> anyhow::Result<()> {
    if rows == 0 {
        return print(&format!("{empty}\n"));
    }
    print(&format!("{}\n", table.lines(0).join("\n")))
}

fn status(client: &Client, args: &StatusArgs) -> anyhow::Result<()> {
    let route = Route::new(&["status"]);
    if args.watch && !args.json {
        return watch::run(client, args.count);
    }
    if args.json {
        let mut looks = 0;
        loop {
            let answer: Value = client.get(&route)?;
            // One line each while watching, for programs.
            if args.watch {
                print(&format!("{answer}\n"))?
            } else {
                print_json(&answer)?
            }
            looks += 1;
            if !args.watch || args.count.is_some_and(|count| looks >= count) {
                return Ok(());
            }
            std::thread::sleep(std::time::Duration::from_secs(1));
        }
    }
    let status: api::Status = client.get(&route)?;
    print(&render(&status, &LagHistory::default(), &Clock::local(), Canvas::of_terminal()))
}

fn host(client: &Client, command: HostCommand) -> anyhow::Result<()> {
    match command {
        HostCommand::Token { name, minutes, json } => {
            let mut body = serde_json::Map::new();
            name.map(|name| body.insert("host_name".into(), name.into()));
            minutes.map(|minutes| body.insert("valid_minutes".into(), minutes.into()));
            let answer: Value = client.call(Method::POST, &Route::new(&["tokens"]), Some(&Value::Object(body)))?;
            if json {
                return print_json(&answer);
            }
            let token: api::Token = serde_json::from_value(answer).context("holdfastd's token is not understood")?;
            let expires = Clock::local().show_seconds(token.expires_us);
            let port = token.listen.as_deref().and_then(|listen| listen.rsplit(':').next()).unwrap_or("7440");
            print(&format!(
                "{}\n\nvalid once, until {expires}; on the host:\n  holdfast-agent enrol --box THIS-BOX:{port} --token {}\n\
                 CA fingerprint (part of the token): {}\n",
                token.token, token.token, token.ca_fingerprint
            ))
        }
        HostCommand::List { json } => {
            let answer: Value = client.get(&Route::new(&["hosts"]))?;
            if json {
                return print_json(&answer);
            }
            let hosts: Vec<api::Host> = list(answer, "hosts")?;
            let now = u64::try_from(Clock::local().now.as_microsecond()).unwrap_or(0);
            print_table(
                &hosts_table(&hosts, now),
                "no host is enrolled: `holdfast host token` makes a token",
                hosts.len(),
            )
        }
        HostCommand::Revoke { host } => {
            let _: Value = client.call(Method::POST, &Route::new(&["hosts", &host, "revoke"]), None)?;
            print(&format!("host {host} is refused from now on; its history stays and can be opened\n"))
        }
    }
}

fn group(client: &Client, command: GroupCommand) -> anyhow::Result<()> {
    match command {
        GroupCommand::List { json } => {
            let answer: Value = client.get(&Route::new(&["groups"]))?;
            if json {
                return print_json(&answer);
            }
            let groups: Vec<api::Group> = list(answer, "groups")?;
            let mut table = Table::new(&["GROUP", "HOST", "STATE", "VOLUMES", "SIZE", "HISTORY", "JOURNAL", "ID"]);
            for group in &groups {
                let bytes = group.volumes.iter().map(|volume| volume.sectors.bytes()).sum();
                table.row([
                    group.name.clone(),
                    group.host_name.clone().unwrap_or_else(|| "over NBD".into()),
                    group.state.clone(),
                    group.volumes.len().to_string(),
                    ByteLen(bytes).to_string(),
                    format!("{:.1} h", group.hours_of_history),
                    ByteLen(group.journal_bytes).to_string(),
                    group.id.clone(),
                ]);
            }
            print_table(&table, "no protection group yet", groups.len())
        }
        GroupCommand::Create { name, volumes, policy } => {
            let volumes: Vec<Value> = volumes.iter().map(|text| parse_volume(text)).collect::<Result<_, _>>()?;
            let mut body = json!({ "name": name, "volumes": volumes });
            let wanted = change_policy(GroupPolicy::default(), &policy)?;
            if wanted != GroupPolicy::default() {
                body["policy"] = serde_json::to_value(wanted).context("write the policy down")?;
            }
            let _: Value = client.call(Method::POST, &Route::new(&["groups"]), Some(&body))?;
            let targets: Value = client.get(&Route::new(&["ingest-targets"]))?;
            let mut lines = format!("group {name} is made; write its volumes over NBD:\n");
            for target in targets.as_array().into_iter().flatten() {
                let text = |key: &str| target[key].as_str().map(str::to_owned);
                // The list holds every group's targets; the daemon names each export after its group.
                let (Some(volume), Some(export), Some(uri)) = (text("volume_name"), text("export_name"), text("uri"))
                else {
                    continue;
                };
                if export == format!("{name}-{volume}") {
                    let size = ByteLen(target["bytes"].as_u64().unwrap_or_default());
                    lines.push_str(&format!("  {volume} ({size})\n    {uri}\n"));
                    text("tcp_uri").into_iter().for_each(|uri| lines.push_str(&format!("    {uri}\n")));
                }
            }
            print(&lines)
        }
        GroupCommand::Policy { group, policy } => {
            let route = Route::new(&["groups", &group]);
            let current: api::Group = client.get(&route)?;
            let current = current.policy.context("the box's policy has parts this version does not know")?;
            let wanted = change_policy(current.clone(), &policy)?;
            if wanted != current {
                let body = serde_json::to_value(&wanted).context("write the policy down")?;
                let _: Value = client.call(Method::PATCH, &Route::new(&["groups", &group, "policy"]), Some(&body))?;
            }
            print(&format!("{}\n", policy_lines(&wanted).join("\n")))
        }
        GroupCommand::Resync { group } => {
            let _: Value = client.call(Method::POST, &Route::new(&["groups", &group, "resync"]), None)?;
            print(&format!("group {group} compares and copies what differs; older moments stay open\n"))
        }
        GroupCommand::Delete { group, confirm } => {
            let route = Route::new(&["groups", &group]).query("confirm", &confirm);
            let _: Value = client.call(Method::DELETE, &route, None)?;
            print(&format!("group {group} and its history are deleted\n"))
        }
    }
}

fn parse_volume(text: &str) -> Result<Value, ChoiceError> {
    let bad = || ChoiceError::VolumeAndSize { text: text.to_owned() };
    let (name, size) = text.rsplit_once(':').ok_or_else(bad)?;
    let bytes = parse_size(size)?;
    if name.is_empty() || bytes.0 == 0 || bytes.0 % model::SECTOR != 0 {
        return Err(bad());
    }
    Ok(json!({ "name": name, "bytes": bytes.0 }))
}

/// `4096`, `512MiB`, `40G`, `1.5TiB`: units of 1024.
fn parse_size(text: &str) -> Result<ByteLen, ChoiceError> {
    let bad = || ChoiceError::Size { text: text.to_owned() };
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KIB" => 10,
        "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        _ => return Err(bad()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift).map(ByteLen).ok_or_else(bad);
    }
    let part: f64 = number.parse().map_err(|_| bad())?;
    let bytes = part * (1u64 << shift) as f64;
    if shift == 0 || bytes >= u64::MAX as f64 { Err(bad()) } else { Ok(ByteLen(bytes as u64)) }
}

fn change_policy(mut policy: GroupPolicy, args: &PolicyArgs) -> anyhow::Result<GroupPolicy> {
    let (wait, bound) = match policy.mode {
        SyncMode::Async => (1000, Bound::Degrade),
        SyncMode::Sync { wait_ms_max, at_bound } => (wait_ms_max, at_bound),
    };
    let is_sync = match args.mode {
        Some(mode) => mode == Mode::Sync,
        None => policy.mode != SyncMode::Async,
    };
    let bound = args.at_bound.map_or(bound, |at_bound| match at_bound {
        AtBound::Degrade => Bound::Degrade,
        AtBound::Hold => Bound::Hold,
    });
    anyhow::ensure!(
        is_sync || (args.wait_ms.is_none() && args.at_bound.is_none()),
        "--wait-ms and --at-bound are for --mode sync: in async mode the host never waits"
    );
    policy.mode = match is_sync {
        true => SyncMode::Sync { wait_ms_max: args.wait_ms.unwrap_or(wait), at_bound: bound },
        false => SyncMode::Async,
    };
    if let Some(max) = &args.journal_max {
        policy.journal_bytes_max = if max == "none" { None } else { Some(parse_size(max)?) };
    }
    policy.window_hours = args.window_hours.unwrap_or(policy.window_hours);
    policy.window_hours_floor = args.window_floor_hours.unwrap_or(policy.window_hours_floor);
    policy.alarm_below_hours = args.alarm_below_hours.unwrap_or(policy.alarm_below_hours);
    policy.priority = args.priority.unwrap_or(policy.priority);
    policy.lag_ms_alarm = args.lag_alarm_ms.unwrap_or(policy.lag_ms_alarm);
    Ok(policy)
}

fn show_points(client: &Client, args: &PointsArgs) -> anyhow::Result<()> {
    let groups = groups(client)?;
    let group = pick_group(&groups, args.group.as_deref().or(args.named.as_deref()))?;
    let canvas = Canvas::of_terminal();
    let route = Route::new(&["groups", id_of(group), "points"]).query("buckets", &canvas.width.to_string());
    let answer: Value = client.get(&route)?;
    if args.json {
        return print_json(&answer);
    }
    let found: api::Points = serde_json::from_value(answer).context("holdfastd's points are not understood")?;
    print(&points::render(&group.name, &found, &Clock::local(), canvas))
}

fn bookmark(client: &Client, command: BookmarkCommand) -> anyhow::Result<()> {
    let (wanted, name) = match &command {
        BookmarkCommand::Create { group, name, .. } | BookmarkCommand::Delete { group, name } => (group, name),
    };
    // Checked here too, so that a wrong name is told before a host freezes its file systems.
    let name: model::BookmarkName = name.parse()?;
    let groups = groups(client)?;
    match command {
        BookmarkCommand::Create { consistency, json, host: Some(host), .. } => {
            let of_host: Vec<&api::Group> = groups.iter().filter(|g| g.host_name.as_deref() == Some(&*host)).collect();
            anyhow::ensure!(
                !of_host.is_empty(),
                "no group is of a host {host:?}\n  what to do: `holdfast group list` shows them"
            );
            bookmark_all(client, &of_host, &name, consistency, json)
        }
        BookmarkCommand::Create { consistency, json, .. } => {
            let group = pick_group(&groups, wanted.as_deref())?;
            let answer = bookmark_one(client, group, &name, consistency)?;
            if json {
                return print_json(&answer);
            }
            print(&bookmark_line(group, &name, answer)?)
        }
        BookmarkCommand::Delete { .. } => {
            let group = pick_group(&groups, wanted.as_deref())?;
            forget_bookmark(client, group, &name)?;
            print(&format!("bookmark {name} of group {} is forgotten\n", group.name))
        }
    }
}

fn bookmark_one(
    client: &Client,
    group: &api::Group,
    name: &model::BookmarkName,
    consistency: BookmarkConsistency,
) -> anyhow::Result<Value> {
    let consistency = match consistency {
        BookmarkConsistency::Crash => "crash",
        BookmarkConsistency::Filesystem => "filesystem",
    };
    let body = json!({ "name": name, "consistency": consistency });
    Ok(client.call(Method::POST, &Route::new(&["groups", id_of(group), "bookmarks"]), Some(&body))?)
}

fn bookmark_line(group: &api::Group, name: &model::BookmarkName, made: Value) -> anyhow::Result<String> {
    let made: api::Bookmark = serde_json::from_value(made).context("holdfastd's bookmark is not understood")?;
    let time = Clock::local().show(made.time_us);
    Ok(format!("bookmark {name} of group {} at LSN {}, {time}\n", group.name, made.lsn))
}

fn forget_bookmark(client: &Client, group: &api::Group, name: &model::BookmarkName) -> anyhow::Result<()> {
    let route = Route::new(&["groups", id_of(group), "bookmarks", name.as_str()]);
    let _: Value = client.call(Method::DELETE, &route, None)?;
    Ok(())
}

/// One name in all of these groups, or in none of them.
fn bookmark_all(
    client: &Client,
    groups: &[&api::Group],
    name: &model::BookmarkName,
    consistency: BookmarkConsistency,
    json: bool,
) -> anyhow::Result<()> {
    let mut made: Vec<(&api::Group, Value)> = Vec::new();
    for group in groups {
        match bookmark_one(client, group, name, consistency) {
            Ok(answer) => made.push((group, answer)),
            Err(e) => {
                for (group, _) in &made {
                    if let Err(e) = forget_bookmark(client, group, name) {
                        eprintln!("bookmark {name} of group {} is still there: {e:#}", group.name);
                    }
                }
                return Err(e.context(format!("no group has the bookmark {name}, for {} did not get it", group.name)));
            }
        }
    }
    if json {
        let all: Vec<Value> = made.into_iter().map(|(_, answer)| answer).collect();
        return print_json(&json!(all));
    }
    let lines: anyhow::Result<Vec<String>> =
        made.into_iter().map(|(g, answer)| bookmark_line(g, name, answer)).collect();
    print(&lines?.concat())
}

fn view(client: &Client, command: ViewCommand) -> anyhow::Result<()> {
    match command {
        ViewCommand::Open { at, group, tcp, idle_minutes, json } => {
            let clock = Clock::local();
            let point = clock.point(&at)?;
            let groups = groups(client)?;
            let group = pick_group(&groups, group.as_deref())?;
            let wish = ViewWish { tcp, idle_minutes };
            if json {
                let body = wish.body(&point);
                let route = Route::new(&["groups", id_of(group), "views"]);
                return print_json(&client.call(Method::POST, &route, Some(&body))?);
            }
            let view = open_view(client, group, &point, &wish)?;
            let took = view.open_ms.map_or_else(String::new, |ms| format!(", opened in {ms:.0} ms"));
            let time = clock.show(view.time_us);
            let mut text =
                format!("view {} of group {}: {time}, LSN {}{took}\n", plain(&view.id), group.name, view.lsn);
            for export in &view.exports {
                text += &format!("\n  {} ({})\n    {}\n", export.volume_name, ByteLen(export.bytes), export.uri);
                if let Some(tcp) = &export.tcp_uri {
                    text += &format!("    {tcp}\n");
                }
                text +=
                    &format!("    nbd-client -unix {} -name {} /dev/nbd0\n", export.unix_socket, export.export_name);
            }
            let limit = match view.idle_limit_s {
                Some(seconds) => {
                    format!(
                        "; it closes by itself when nobody has had it open for {}",
                        show_span_us(seconds.saturating_mul(1_000_000))
                    )
                }
                None => String::new(),
            };
            text += &format!(
                "\nread-only; `holdfast view close {}` when done: an open view holds history back{limit}\n",
                plain(&view.id)
            );
            print(&text)
        }
        ViewCommand::List { json } => {
            let answer: Value = client.get(&Route::new(&["views"]))?;
            if json {
                return print_json(&answer);
            }
            let views: Vec<api::View> = list(answer, "views")?;
            let clock = Clock::local();
            let mut table = Table::new(&["VIEW", "GROUP", "MOMENT", "LSN", "HELD BY", "CLOSES", "SOCKETS"]);
            for view in &views {
                let sockets: Vec<&str> = view.exports.iter().map(|e| e.unix_socket.as_str()).collect();
                table.row([
                    plain(&view.id),
                    view.group.clone(),
                    clock.show(view.time_us),
                    view.lsn.to_string(),
                    held_by(view),
                    closes(view),
                    sockets.join(" "),
                ]);
            }
            print_table(&table, "no view is open", views.len())
        }
        ViewCommand::Close { id } => {
            let _: Value = client.call(Method::DELETE, &Route::new(&["views", &id]), None)?;
            print(&format!("view {id} is closed\n"))
        }
    }
}

/// Who has a view open, or who opened it when nobody has.
pub fn held_by(view: &api::View) -> String {
    match (&view.clients[..], &view.opened_by) {
        ([], None) => "nobody".to_owned(),
        ([], Some(by)) => format!("nobody; opened by {by}"),
        (clients, _) => clients.join("; "),
    }
}

pub fn closes(view: &api::View) -> String {
    match (view.closes_in_s, view.idle_limit_s) {
        (Some(seconds), _) => format!("in {}", show_span_us(seconds.saturating_mul(1_000_000))),
        (None, Some(_)) => "not while held".to_owned(),
        (None, None) => "by hand".to_owned(),
    }
}

fn verify(client: &Client, args: &VerifyArgs) -> anyhow::Result<Outcome> {
    let groups = groups(client)?;
    let group = pick_group(&groups, args.group.as_deref().or(args.named.as_deref()))?;
    let route = Route::new(&["groups", id_of(group), "verify"]);
    let bar = crate::copy::progress_bar(0);
    let mut report = None;
    client.stream(Method::POST, &route, |line| {
        // The report is the last line; everything before it is progress.
        let number = |names: [&str; 2]| names.iter().find_map(|name| find(&line, name).and_then(Value::as_u64));
        match (number(["done_bytes", "done"]), number(["total_bytes", "total"])) {
            (Some(done), Some(total)) => {
                bar.set_length(total);
                bar.set_position(done);
            }
            _ => report = Some(line),
        }
        Ok(())
    })?;
    bar.finish_and_clear();
    let what = format!("verify group {}", group.name);
    let report = report.ok_or(crate::client::ApiError::Unfinished { what })?;
    if let Some(message) = find(&report, "error").and_then(|e| e.get("message")).and_then(Value::as_str) {
        anyhow::bail!("verification of group {} ended: {message}", group.name);
    }
    let report = report.get("report").unwrap_or(&report);
    if args.json {
        print_json(report)?;
    }
    let summary = offline::Verified::from_json(report);
    if !args.json {
        print(&summary.text(&format!("group {}", group.name)))?;
    }
    Ok(summary.outcome())
}

/// A field of the line itself or of what it wraps (`{"progress":{…}}`).
fn find<'a>(line: &'a Value, name: &str) -> Option<&'a Value> {
    line.get(name).or_else(|| line.get("progress").and_then(|progress| progress.get(name)))
}

fn client_cert(client: &Client, args: &ClientCertArgs) -> anyhow::Result<()> {
    let files = ["ca-cert.pem", "client-cert.pem", "client-key.pem"].map(|name| args.out.join(name));
    if let Some(there) = files.iter().find(|file| file.exists()) {
        anyhow::bail!("{} exists already; name another folder with --out", there.display());
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&args.out)
        .with_context(|| format!("make the folder {}", args.out.display()))?;
    let body = json!({ "name": args.name });
    let made: api::ClientCert = client.call(Method::POST, &Route::new(&["client-certs"]), Some(&body))?;
    anyhow::ensure!(!made.key_pem.is_empty(), "holdfastd's answer holds no key");
    for (file, pem) in files.iter().zip([&made.ca_pem, &made.certificate_pem, &made.key_pem]) {
        write_new(file, pem).with_context(|| format!("write {}", file.display()))?;
    }
    print(&format!(
        "{} in {}: ca-cert.pem, client-cert.pem, client-key.pem; e.g.\n  qemu-img info --object \
         tls-creds-x509,id=tls0,endpoint=client,dir={} --image-opts driver=nbd,host=BOX,port=10809,export=NAME,tls-creds=tls0\n",
        count(files.len(), "file"),
        args.out.display(),
        args.out.display()
    ))
}

fn write_new(path: &Path, text: &str) -> std::io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[test]
    fn sizes_are_read_with_and_without_units() {
        for (text, want) in [
            ("512", 512),
            ("4K", 4096),
            ("512MiB", 512 << 20),
            ("40G", 40 << 30),
            ("1.5TiB", 3 << 39),
            ("2 gib", 2 << 30),
        ] {
            assert_eq!(parse_size(text), Ok(ByteLen(want)), "{text}");
        }
        for text in ["", "x", "1.5", "10X", "99999999999T", "-1", "1e9", "1..5G"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert_eq!(parse_volume("a:b:1K"), Ok(json!({ "name": "a:b", "bytes": 1024 })));
        for text in ["a", ":1K", "a:0", "a:100", "a:"] {
            assert!(parse_volume(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_policy_is_changed_where_it_is_asked() {
        let change = |line: &str, from: GroupPolicy| {
            let args = Args::try_parse_from(format!("holdfast group policy g {line}").split_whitespace()).unwrap();
            let Command::Group(GroupCommand::Policy { policy, .. }) = args.command else { panic!("another command") };
            change_policy(from, &policy)
        };
        let same = change("", GroupPolicy::default()).unwrap();
        assert_eq!(same, GroupPolicy::default());
        let sync = change("--mode sync --wait-ms 300 --journal-max 5G", GroupPolicy::default()).unwrap();
        assert_eq!(sync.mode, SyncMode::Sync { wait_ms_max: 300, at_bound: Bound::Degrade });
        assert_eq!(sync.journal_bytes_max, Some(ByteLen(5 << 30)));
        let held = change("--at-bound hold --journal-max none", sync.clone()).unwrap();
        assert_eq!(held.mode, SyncMode::Sync { wait_ms_max: 300, at_bound: Bound::Hold });
        assert_eq!(held.journal_bytes_max, None);
        assert_eq!(change("--mode async --window-hours 5", held).unwrap().mode, SyncMode::Async);
        assert!(change("--wait-ms 5", GroupPolicy::default()).is_err());
    }

    #[test]
    fn groups_and_volumes_are_picked_by_name_number_or_being_the_only_one() {
        let group = |name: &str, id: &str| api::Group { name: name.into(), id: id.into(), ..Default::default() };
        let two = [group("a", "11"), group("b", "22")];
        assert_eq!(pick_group(&two, Some("b")).unwrap().id, "22");
        assert_eq!(pick_group(&two, Some("11")).unwrap().name, "a");
        assert_eq!(pick_group(&two[..1], None).unwrap().name, "a");
        assert_eq!(pick_group(&[], None).unwrap_err(), ChoiceError::NoGroups);
        assert!(pick_group(&two, None).unwrap_err().remedy().contains("a, b"));
        assert!(matches!(pick_group(&two, Some("c")), Err(ChoiceError::NoSuchGroup { .. })));

        let volume = |id, name: &str| VolumeSpec {
            id: model::VolumeId(id),
            name: name.into(),
            sectors: model::Sectors(1),
            identity: String::new(),
        };
        let volumes = [volume(0, "/dev/sda"), volume(1, "2"), volume(2, "/dev/sdc")];
        assert_eq!(pick_volume(&volumes, "g", Some("0")).unwrap().name, "/dev/sda");
        assert_eq!(pick_volume(&volumes, "g", Some("2")).unwrap().id.0, 1, "the name wins");
        assert_eq!(pick_volume(&volumes[2..], "g", None).unwrap().id.0, 2);
        assert!(pick_volume(&volumes, "g", None).unwrap_err().remedy().contains("/dev/sdc"));
        assert!(matches!(pick_volume(&volumes, "g", Some("x")), Err(ChoiceError::NoSuchVolume { .. })));
    }
}
