//! Who is at the front door: a client certificate for the whole connection, or a bearer token with
//! each request.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;
use parking_lot::Mutex;
use selvedge_certs::Identity;
use selvedge_proto::status::{Code, Status};

use super::token::Tokens;
use crate::calls::Caller;
use crate::fabric::Fabric;
use crate::policy::LivePolicy;

/// What the listeners of the front door share.
#[derive(Debug)]
pub(crate) struct Door {
    pub(crate) fabric: Arc<Fabric>,
    /// The tokens in force; replaced on reload.
    pub(crate) tokens: ArcSwapOption<Tokens>,
}

/// The peer of one connection.
pub(crate) struct Visitor {
    pub(crate) door: Arc<Door>,
    listener: &'static str,
    /// From the client certificate.
    certified: Option<Caller>,
    /// Whoever proved a token last, since most connections have one.
    last: Mutex<Option<Caller>>,
}

impl Visitor {
    pub(crate) fn new(
        door: &Arc<Door>,
        listener: &'static str,
        certified: Option<&Identity>,
    ) -> Self {
        Self {
            door: Arc::clone(door),
            listener,
            certified: certified.map(|identity| caller(&door.fabric, identity)),
            last: Mutex::new(None),
        }
    }

    /// Whoever makes the request with these headers. A certificate counts before a token, since
    /// clients of OpenAI send one in any case.
    ///
    /// # Errors
    /// Neither is there.
    pub(crate) fn caller(&self, headers: &HeaderMap) -> Result<Caller, Status> {
        if let Some(caller) = &self.certified {
            return Ok(caller.clone());
        }
        let refused = |reason, why: &str| {
            self.door.fabric.metrics.refuse(self.listener, reason);
            Err(Status::new(Code::Unauthenticated, why))
        };
        let Some(header) = headers.get(AUTHORIZATION) else {
            return refused(
                "no_token",
                "expected a client certificate or the header Authorization: Bearer with a token, \
                 found neither",
            );
        };
        let token = header.to_str().ok().and_then(|text| {
            let (scheme, token) = text.split_once(' ')?;
            scheme
                .eq_ignore_ascii_case("bearer")
                .then_some(token.trim())
        });
        let tokens = self.door.tokens.load();
        let identity = token.and_then(|token| tokens.as_ref()?.verify(token));
        let Some(identity) = identity else {
            return refused("token", "the bearer token is not known here");
        };
        let mut last = self.last.lock();
        match &*last {
            Some(held) if held.identity == identity => Ok(held.clone()),
            _ => {
                let caller = caller(&self.door.fabric, &identity);
                *last = Some(caller.clone());
                Ok(caller)
            }
        }
    }
}

fn caller(fabric: &Arc<Fabric>, identity: &Identity) -> Caller {
    Caller {
        fabric: Arc::clone(fabric),
        tenant: fabric.tenant(identity),
        identity: identity.clone(),
        policy: LivePolicy::new(fabric, identity),
    }
}
