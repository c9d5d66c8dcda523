//! Users, their passwords, API tokens, and how the first administrator comes to be.
//!
//! There is no default password: while no administrator exists, only a setup code – shown on the box, valid once and for an hour – makes
//! one. Passwords are kept as argon2id strings, tokens as SHA-256 (they are random). The file is replaced as a whole before anything it
//! says takes effect; the console can always set a password anew, so nobody can be locked out for good.
//!
//! Hashing takes 19 MiB and some tens of milliseconds on purpose: [`HASHES_AT_ONCE`] run at once, on blocking threads, and the permit goes
//! with the work, so that a client that breaks off frees nothing early.

use crate::{
    access::{Caller, Role, Via},
    limits::{Key, Limits},
    secret,
    sessions::{Flash, Session, Sessions},
};
use argon2::{Argon2, PasswordHasher as _, PasswordVerifier as _};
use serde::{Deserialize, Serialize};
use std::{
    io,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};
use tokio::sync::Semaphore;

pub const PASSWORD_MIN: usize = 10;
pub const PASSWORD_MAX: usize = 256;
const NAME_MAX: usize = 64;
const USERS_MAX: usize = 256;
const TOKENS_MAX: usize = 256;
const HASHES_AT_ONCE: usize = 2;
/// Waiting for one of them longer than this is an attack on us; the answer is "later".
const HASH_WAIT: Duration = Duration::from_secs(10);
const SETUP_CODE_MS: u64 = 60 * 60 * 1000;
const TOKEN_PREFIX: &str = "hft_";

/// Where the accounts are kept: one small file, private, replaced whole.
pub trait Keep: Send + Sync + 'static {
    fn load(&self) -> io::Result<Option<Vec<u8>>>;
    /// Durable when it returns.
    fn save(&self, data: &[u8]) -> io::Result<()>;
}

#[derive(Debug, thiserror::Error)]
pub enum AccountError {
    #[error("the accounts could not be read or kept")]
    Keep(#[source] io::Error),
    #[error("the file of accounts is damaged")]
    Damaged(#[source] serde_json::Error),
    #[error("the system gave no random bytes")]
    Random,
    #[error("the password could not be hashed")]
    Hash,
    #[error("too many sign-ins are being checked")]
    Busy,
    #[error("{0:?} is no name: 1 to {NAME_MAX} letters, digits, dots, dashes or underscores")]
    Name(String),
    #[error("a password has {PASSWORD_MIN} to {PASSWORD_MAX} characters")]
    Password,
    #[error("{0:?} is no role: viewer, operator or administrator")]
    Role(String),
    #[error("there is a user {0:?} already")]
    Taken(String),
    #[error("there is no user {0:?}")]
    NoUser(String),
    #[error("there is no token {0:?}")]
    NoToken(String),
    #[error("{0:?} is the last administrator")]
    Last(String),
    #[error("there is a limit of {USERS_MAX} users and {TOKENS_MAX} tokens")]
    TooMany,
    #[error("the box has an administrator already")]
    SetUpAlready,
    #[error("the setup code is wrong, used or too old")]
    SetupCode,
    #[error("name or password is wrong")]
    Wrong,
    #[error("too many attempts; the next one is possible in {seconds} s")]
    Wait { seconds: u64 },
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct User {
    name: String,
    role: Role,
    /// An argon2id string in PHC's form.
    password: String,
    created_us: u64,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Token {
    id: String,
    name: String,
    role: Role,
    hash: String,
    created_us: u64,
    by: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Data {
    version: u32,
    users: Vec<User>,
    tokens: Vec<Token>,
}

/// A user as it is shown.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct UserShown {
    pub name: String,
    pub role: Role,
    pub created_us: u64,
}

/// A token as it is shown: without its secret, which nobody has but its owner.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct TokenShown {
    pub id: String,
    pub name: String,
    pub role: Role,
    pub created_us: u64,
    pub by: String,
}

struct SetupCode {
    hash: String,
    until_ms: u64,
}

/// Everything about who may come in.
pub struct Accounts {
    keep: Box<dyn Keep>,
    data: Mutex<Data>,
    sessions: Mutex<Sessions>,
    limits: Mutex<Limits>,
    setup: Mutex<Option<SetupCode>>,
    hashes: Arc<Semaphore>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each critical section leaves its data whole at each step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Accounts {
    /// Blocking.
    pub fn open(keep: Box<dyn Keep>) -> Result<Self, AccountError> {
        let data = match keep.load().map_err(AccountError::Keep)? {
            None => Data { version: 1, ..Data::default() },
            Some(bytes) => serde_json::from_slice(&bytes).map_err(AccountError::Damaged)?,
        };
        Ok(Self {
            keep,
            data: Mutex::new(data),
            sessions: Mutex::default(),
            limits: Mutex::default(),
            setup: Mutex::default(),
            hashes: Arc::new(Semaphore::new(HASHES_AT_ONCE)),
        })
    }

    /// Whether nobody can sign in yet.
    pub fn needs_setup(&self) -> bool {
        !lock(&self.data).users.iter().any(|u| u.role == Role::Administrator)
    }

    /// A code that makes the first administrator; an earlier one is void.
    pub fn make_setup_code(&self, now_ms: u64) -> Result<String, AccountError> {
        if !self.needs_setup() {
            return Err(AccountError::SetUpAlready);
        }
        let code = secret::random_words(4).ok_or(AccountError::Random)?;
        let hash = secret::hash(&secret::plain_words(&code));
        *lock(&self.setup) = Some(SetupCode { hash, until_ms: now_ms + SETUP_CODE_MS });
        Ok(code)
    }

    /// Makes the first administrator and signs them in.
    pub async fn set_up(
        &self,
        code: &str,
        name: &str,
        password: &str,
        from: IpAddr,
        now_ms: u64,
    ) -> Result<String, AccountError> {
        let keys = [Key::Account("\u{0}setup".into()), address_key(from)];
        self.may_try(&keys, now_ms)?;
        if !self.needs_setup() {
            return Err(AccountError::SetUpAlready);
        }
        let hash = secret::hash(&secret::plain_words(code));
        let fits = |c: &SetupCode| now_ms < c.until_ms && secret::same(&c.hash, &hash);
        if !lock(&self.setup).as_ref().is_some_and(fits) {
            lock(&self.limits).failed(&keys, now_ms);
            return Err(AccountError::SetupCode);
        }
        check_name(name)?;
        check_password(password)?;
        let hashed = self.hash(password.to_owned()).await?;
        // Taken out before anybody is made: of two who come with it at once, one gets it.
        if !lock(&self.setup).take().as_ref().is_some_and(fits) {
            return Err(AccountError::SetupCode);
        }
        self.change(|data| {
            if data.users.iter().any(|u| u.role == Role::Administrator) {
                return Err(AccountError::SetUpAlready);
            }
            data.users.retain(|u| u.name != name);
            data.users.push(User {
                name: name.into(),
                role: Role::Administrator,
                password: hashed,
                created_us: now_ms * 1000,
            });
            Ok(())
        })?;
        lock(&self.limits).succeeded(&keys);
        lock(&self.sessions).begin(name, Role::Administrator, now_ms).ok_or(AccountError::Random)
    }

    /// Begins a session; what its cookie gets.
    pub async fn sign_in(
        &self,
        name: &str,
        password: &str,
        from: IpAddr,
        now_ms: u64,
    ) -> Result<(String, Role), AccountError> {
        let shown: String = name.chars().take(NAME_MAX).collect();
        let keys = [Key::Account(shown), address_key(from)];
        self.may_try(&keys, now_ms)?;
        let user = lock(&self.data).users.iter().find(|u| u.name == name).cloned();
        let known = user.is_some();
        // Somebody who is not there takes as long as somebody who is.
        let hash = match &user {
            Some(user) => user.password.clone(),
            None => self.nobody().await?,
        };
        let right = password.len() <= PASSWORD_MAX && self.verify(password.to_owned(), hash).await?;
        let Some(user) = user.filter(|_| right && known) else {
            lock(&self.limits).failed(&keys, now_ms);
            return Err(AccountError::Wrong);
        };
        lock(&self.limits).succeeded(&keys[..1]);
        let id = lock(&self.sessions).begin(&user.name, user.role, now_ms).ok_or(AccountError::Random)?;
        Ok((id, user.role))
    }

    fn may_try(&self, keys: &[Key], now_ms: u64) -> Result<(), AccountError> {
        match lock(&self.limits).wait_ms(keys, now_ms) {
            0 => Ok(()),
            ms => Err(AccountError::Wait { seconds: ms.div_ceil(1000) }),
        }
    }

    pub fn session(&self, id: &str, now_ms: u64, uses: bool) -> Option<Session> {
        lock(&self.sessions).find(id, now_ms, uses)
    }
    pub fn sign_out(&self, id: &str) {
        lock(&self.sessions).end(id);
    }
    pub(crate) fn say(&self, id: &str, flash: Flash) {
        lock(&self.sessions).say(id, flash);
    }
    pub(crate) fn said(&self, id: &str) -> Option<Flash> {
        lock(&self.sessions).said(id)
    }
    pub(crate) fn stream_begins(&self, id: &str) -> bool {
        lock(&self.sessions).stream_begins(id)
    }
    pub(crate) fn stream_ends(&self, id: &str) {
        lock(&self.sessions).stream_ends(id);
    }

    pub fn users(&self) -> Vec<UserShown> {
        let data = lock(&self.data);
        data.users.iter().map(|u| UserShown { name: u.name.clone(), role: u.role, created_us: u.created_us }).collect()
    }

    pub async fn create_user(&self, name: &str, role: Role, password: &str, now_us: u64) -> Result<(), AccountError> {
        check_name(name)?;
        check_password(password)?;
        let password = self.hash(password.to_owned()).await?;
        self.change(|data| {
            if data.users.iter().any(|u| u.name == name) {
                return Err(AccountError::Taken(name.into()));
            }
            if data.users.len() >= USERS_MAX {
                return Err(AccountError::TooMany);
            }
            data.users.push(User { name: name.into(), role, password, created_us: now_us });
            Ok(())
        })
    }

    /// Changes a user's role, password or both; their sessions end.
    pub async fn change_user(
        &self,
        name: &str,
        role: Option<Role>,
        password: Option<&str>,
    ) -> Result<(), AccountError> {
        let hashed = match password {
            Some(password) => {
                check_password(password)?;
                Some(self.hash(password.to_owned()).await?)
            }
            None => None,
        };
        self.change(|data| {
            let admins = administrators(data);
            let user = data.users.iter_mut().find(|u| u.name == name);
            let user = user.ok_or_else(|| AccountError::NoUser(name.into()))?;
            if let Some(role) = role {
                if user.role == Role::Administrator && role != Role::Administrator && admins == 1 {
                    return Err(AccountError::Last(name.into()));
                }
                user.role = role;
            }
            if let Some(hashed) = hashed {
                user.password = hashed;
            }
            Ok(())
        })?;
        lock(&self.sessions).end_user(name, None);
        Ok(())
    }

    /// Changes one's own password, which has to be shown once more; one's other sessions end.
    pub async fn change_own(
        &self,
        session: &str,
        name: &str,
        old: &str,
        new: &str,
        from: IpAddr,
        now_ms: u64,
    ) -> Result<(), AccountError> {
        let keys = [Key::Account(name.into()), address_key(from)];
        self.may_try(&keys, now_ms)?;
        check_password(new)?;
        let hash = lock(&self.data).users.iter().find(|u| u.name == name).map(|u| u.password.clone());
        let hash = hash.ok_or_else(|| AccountError::NoUser(name.into()))?;
        if old.len() > PASSWORD_MAX || !self.verify(old.to_owned(), hash).await? {
            lock(&self.limits).failed(&keys, now_ms);
            return Err(AccountError::Wrong);
        }
        let hashed = self.hash(new.to_owned()).await?;
        self.change(|data| {
            let user = data.users.iter_mut().find(|u| u.name == name);
            user.ok_or_else(|| AccountError::NoUser(name.into()))?.password = hashed;
            Ok(())
        })?;
        lock(&self.sessions).end_user(name, Some(session));
        Ok(())
    }

    /// A new password for somebody, from the console: nothing there is delayed or refused.
    pub async fn reset_password(&self, name: &str) -> Result<String, AccountError> {
        let password = secret::random_words(5).ok_or(AccountError::Random)?;
        self.change_user(name, None, Some(&password)).await?;
        lock(&self.limits).succeeded(&[Key::Account(name.into())]);
        Ok(password)
    }

    pub fn delete_user(&self, name: &str) -> Result<(), AccountError> {
        self.change(|data| {
            let user = data.users.iter().find(|u| u.name == name);
            let user = user.ok_or_else(|| AccountError::NoUser(name.into()))?;
            if user.role == Role::Administrator && administrators(data) == 1 {
                return Err(AccountError::Last(name.into()));
            }
            data.users.retain(|u| u.name != name);
            Ok(())
        })?;
        lock(&self.sessions).end_user(name, None);
        Ok(())
    }

    pub fn tokens(&self) -> Vec<TokenShown> {
        let data = lock(&self.data);
        let shown = |t: &Token| TokenShown {
            id: t.id.clone(),
            name: t.name.clone(),
            role: t.role,
            created_us: t.created_us,
            by: t.by.clone(),
        };
        data.tokens.iter().map(shown).collect()
    }

    /// Makes a token for scripts; its secret is told once.
    pub fn create_token(
        &self,
        name: &str,
        role: Role,
        by: &str,
        now_us: u64,
    ) -> Result<(String, String), AccountError> {
        check_name(name)?;
        let (id, random) = (secret::random_hex::<4>(), secret::random_hex::<24>());
        let (Some(id), Some(random)) = (id, random) else { return Err(AccountError::Random) };
        let text = format!("{TOKEN_PREFIX}{random}");
        self.change(|data| {
            if data.tokens.len() >= TOKENS_MAX {
                return Err(AccountError::TooMany);
            }
            data.tokens.push(Token {
                id: id.clone(),
                name: name.into(),
                role,
                hash: secret::hash(&text),
                created_us: now_us,
                by: by.into(),
            });
            Ok(())
        })?;
        Ok((id, text))
    }

    pub fn delete_token(&self, id: &str) -> Result<(), AccountError> {
        self.change(|data| {
            let had = data.tokens.len();
            data.tokens.retain(|t| t.id != id);
            if data.tokens.len() == had { Err(AccountError::NoToken(id.into())) } else { Ok(()) }
        })
    }

    /// Who shows this bearer token.
    pub fn bearer(&self, text: &str, from: IpAddr, now_ms: u64) -> Result<Caller, AccountError> {
        let keys = [address_key(from)];
        self.may_try(&keys, now_ms)?;
        let hash = secret::hash(text);
        let data = lock(&self.data);
        let Some(token) = data.tokens.iter().find(|t| secret::same(&t.hash, &hash)) else {
            drop(data);
            lock(&self.limits).failed(&keys, now_ms);
            return Err(AccountError::Wrong);
        };
        Ok(Caller { name: format!("token:{}", token.name), role: token.role, via: Via::Api, from: from.to_string() })
    }

    /// What `how` makes of the accounts takes effect when it is durable.
    fn change(&self, how: impl FnOnce(&mut Data) -> Result<(), AccountError>) -> Result<(), AccountError> {
        let mut data = lock(&self.data);
        let mut next = data.clone();
        how(&mut next)?;
        let bytes = serde_json::to_vec(&next).map_err(AccountError::Damaged)?;
        self.keep.save(&bytes).map_err(AccountError::Keep)?;
        *data = next;
        Ok(())
    }

    async fn hash(&self, password: String) -> Result<String, AccountError> {
        self.hashing(move || {
            let salt = secret::random_hex::<16>().ok_or(AccountError::Random)?;
            let hash = Argon2::default().hash_password_with_salt(password.as_bytes(), salt.as_bytes());
            hash.map(|hash| hash.to_string()).map_err(|_| AccountError::Hash)
        })
        .await
    }

    async fn verify(&self, password: String, hash: String) -> Result<bool, AccountError> {
        self.hashing(move || Ok(Argon2::default().verify_password(password.as_bytes(), hash.as_str()).is_ok())).await
    }

    /// The hash of a password that nobody has.
    async fn nobody(&self) -> Result<String, AccountError> {
        static NOBODY: OnceLock<String> = OnceLock::new();
        if let Some(hash) = NOBODY.get() {
            return Ok(hash.clone());
        }
        let hash = self.hash(secret::random_hex::<16>().ok_or(AccountError::Random)?).await?;
        Ok(NOBODY.get_or_init(|| hash).clone())
    }

    async fn hashing<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, AccountError> + Send + 'static,
    ) -> Result<T, AccountError> {
        let permit = tokio::time::timeout(HASH_WAIT, Arc::clone(&self.hashes).acquire_owned()).await;
        let Ok(Ok(permit)) = permit else { return Err(AccountError::Busy) };
        let done = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        });
        done.await.map_err(|_| AccountError::Hash)?
    }
}

fn administrators(data: &Data) -> usize {
    data.users.iter().filter(|u| u.role == Role::Administrator).count()
}

/// An IPv6 network of 64 bits counts as one: whoever has one of its addresses has all.
fn address_key(from: IpAddr) -> Key {
    Key::Address(match from.to_canonical() {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("{:x?}", &ip.segments()[..4]),
    })
}

fn check_name(name: &str) -> Result<(), AccountError> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(fine) {
        return Err(AccountError::Name(name.chars().take(NAME_MAX).collect()));
    }
    Ok(())
}

fn check_password(password: &str) -> Result<(), AccountError> {
    let fine = password.chars().count() >= PASSWORD_MIN && password.len() <= PASSWORD_MAX;
    if fine { Ok(()) } else { Err(AccountError::Password) }
}
