//! Control frames of a client after its Hello.

use std::time::Duration;

use bytes::Bytes;
use selvedge_proto::frame;
use selvedge_proto::inference::{TensorSpec, Tier};
use selvedge_proto::message::Qos;
use selvedge_proto::status::{Code, Status};
use selvedge_proto::topic::{SubscribeTarget, TopicName};
use selvedge_proto::wire;
use wire::control::Frame;

use super::connection::Actor;
use crate::history::Replay;
use crate::models::WorkerModel;
use crate::policy::{Decision, Verb};
use crate::queue::Overflow;
use crate::services::{Link, Responder};
use crate::store::from_unix_ms;
use crate::system;
use crate::tenant::{RetainDelivery, SubscribeRequest};

/// What follows from a control frame.
pub(super) enum Next {
    /// Nothing.
    Continue,
    /// This goes back.
    Send(Box<Frame>),
    /// The client leaves.
    Goodbye,
}

impl Actor {
    /// Handles one control frame. An error ends the connection.
    pub(super) fn control_frame(&mut self, body: Bytes) -> Result<Next, Status> {
        let control: wire::Control = frame::decode("control", body)
            .map_err(|error| Status::new(Code::InvalidArgument, error.to_string()))?;
        // A frame of a later revision decodes as none.
        let Some(frame) = control.frame else {
            return Ok(Next::Continue);
        };
        let (request_id, statuses) = match frame {
            Frame::Subscribe(subscribe) => (
                subscribe.request_id,
                subscribe
                    .subscriptions
                    .iter()
                    .map(|subscription| self.subscribe(subscription))
                    .collect(),
            ),
            Frame::Unsubscribe(unsubscribe) => (
                unsubscribe.request_id,
                unsubscribe
                    .ids
                    .iter()
                    .map(|&id| self.unsubscribe(id))
                    .collect(),
            ),
            Frame::Serve(serve) => (
                serve.request_id,
                vec![
                    self.serve(&serve)
                        .inspect_err(|status| self.refused(Verb::Serve, &serve.service, status)),
                ],
            ),
            Frame::Unserve(unserve) => (unserve.request_id, vec![self.unserve(unserve.id)]),
            Frame::Work(work) => {
                let (request_id, model) = (work.request_id, work.model.clone());
                let outcome = self.work(work);
                (
                    request_id,
                    vec![outcome.inspect_err(|status| self.refused(Verb::Work, &model, status))],
                )
            }
            Frame::Unwork(unwork) => (unwork.request_id, vec![self.unwork(unwork.id)]),
            Frame::LoadReport(report) => {
                if let Some((model, worker)) = self.models.get(&report.id) {
                    self.tenant.models.report(
                        model,
                        worker,
                        report.slots,
                        report.loaded,
                        Duration::from_micros(report.service_time_us.into()),
                    );
                }
                return Ok(Next::Continue);
            }
            Frame::DeliveryAck(ack) => {
                if let Some(queue) = self.lanes.get(&ack.lane) {
                    let session = &self.attachment.session;
                    session.acknowledge(queue, self.attachment.epoch, ack.last);
                }
                return Ok(Next::Continue);
            }
            Frame::Ping(ping) => {
                return Ok(Next::Send(Box::new(Frame::Pong(wire::Pong {
                    token: ping.token,
                }))));
            }
            Frame::Goodbye(_) => return Ok(Next::Goodbye),
            Frame::Pong(_) => return Ok(Next::Continue),
            Frame::Hello(_) => {
                return Err(Status::new(
                    Code::InvalidArgument,
                    "a second Hello on one connection",
                ));
            }
            Frame::Welcome(_)
            | Frame::Reply(_)
            | Frame::PublishAck(_)
            | Frame::PublishRefused(_) => {
                return Err(Status::new(
                    Code::InvalidArgument,
                    "a control frame that only a broker sends",
                ));
            }
        };
        let reply = Frame::Reply(wire::Reply {
            request_id,
            statuses: statuses
                .into_iter()
                .map(|outcome: Result<(), Status>| outcome.err().unwrap_or_else(Status::ok).into())
                .collect(),
        });
        Ok(Next::Send(Box::new(reply)))
    }

    fn subscribe(&self, subscription: &wire::Subscription) -> Result<(), Status> {
        if subscription.id == 0 {
            return Err(invalid("subscription id 0: expected a positive number"));
        }
        let target = SubscribeTarget::parse(&subscription.filter)
            .map_err(|error| invalid(&error.to_string()))?;
        let max_qos = u8::try_from(subscription.max_qos)
            .ok()
            .and_then(|qos| Qos::try_from(qos).ok())
            .ok_or_else(|| {
                invalid(&format!(
                    "quality of service {}: expected 0 or 1",
                    subscription.max_qos
                ))
            })?;
        self.tenant.subscribe(
            &self.attachment.session,
            &self.policy.now(),
            SubscribeRequest {
                id: subscription.id,
                target,
                max_qos: max_qos.min(Qos::AtLeastOnce),
                no_local: subscription.no_local,
                retain_as_published: subscription.retain_as_published,
                identifier: None,
                // The shared lanes carry one form of a message for all their subscriptions.
                own_lane: subscription.own_lane || subscription.retain_as_published,
                overflow: match subscription.overflow() {
                    wire::Overflow::Default => Overflow::Default,
                    wire::Overflow::DropOldest => Overflow::DropOldest,
                    wire::Overflow::DropNewest => Overflow::DropNewest,
                    wire::Overflow::Disconnect => Overflow::Disconnect,
                    wire::Overflow::Refuse => Overflow::Refuse,
                },
                retain: match subscription.retain_handling() {
                    wire::RetainHandling::RetainSend => RetainDelivery::Send,
                    wire::RetainHandling::RetainSendIfNew => RetainDelivery::IfNew,
                    wire::RetainHandling::RetainDoNotSend => RetainDelivery::Never,
                },
                replay: subscription.replay.as_ref().map(|replay| Replay {
                    last: (replay.last > 0).then_some(replay.last),
                    from: replay.from_ms.map(from_unix_ms),
                    until: replay.until_ms.map(from_unix_ms),
                }),
                datagrams: subscription.datagrams,
            },
        )
    }

    fn unsubscribe(&self, id: u32) -> Result<(), Status> {
        if self.tenant.unsubscribe(&self.attachment.session, id) {
            Ok(())
        } else {
            Err(Status::new(
                Code::NotFound,
                format!("no subscription has the id {id}"),
            ))
        }
    }

    fn serve(&mut self, serve: &wire::Serve) -> Result<(), Status> {
        let service = TopicName::parse(serve.service.as_str())
            .map_err(|error| invalid(&error.to_string()))?;
        self.may_register(serve.id, Verb::Serve, &service)?;
        system::check_unreserved(&service)?;
        let responder = Responder::new(
            self.identity.clone(),
            serve.id,
            Link::Quic(self.connection.clone()),
            serve.max_in_flight,
        );
        let responder = self.tenant.services.insert(service.clone(), responder);
        self.services.insert(serve.id, (service, responder));
        Ok(())
    }

    fn unserve(&mut self, id: u32) -> Result<(), Status> {
        let Some((service, responder)) = self.services.remove(&id) else {
            return Err(Status::new(
                Code::NotFound,
                format!("no service has the id {id}"),
            ));
        };
        self.tenant.services.remove(&service, &responder, None);
        Ok(())
    }

    fn work(&mut self, work: wire::Work) -> Result<(), Status> {
        let model =
            TopicName::parse(work.model.as_str()).map_err(|error| invalid(&error.to_string()))?;
        self.may_register(work.id, Verb::Work, &model)?;
        let tier = Tier::from_wire(work.tier).map_err(|error| invalid(&error.to_string()))?;
        let worker = WorkerModel::new(
            self.identity.clone(),
            work.id,
            self.connection.clone(),
            work.version,
            tier,
            work.slots,
            work.loaded,
            work.inputs.into_iter().map(TensorSpec::from).collect(),
            work.outputs.into_iter().map(TensorSpec::from).collect(),
            work.continues,
        );
        worker
            .load()
            .set_service_time(Duration::from_micros(work.service_time_us.into()));
        let worker = self.tenant.models.insert(&model, worker);
        self.models.insert(work.id, (model, worker));
        Ok(())
    }

    fn unwork(&mut self, id: u32) -> Result<(), Status> {
        let Some((model, worker)) = self.models.remove(&id) else {
            return Err(Status::new(
                Code::NotFound,
                format!("no model has the id {id}"),
            ));
        };
        self.tenant.models.remove(&model, &worker, None);
        Ok(())
    }

    /// Remembers, for `selvedge explain`, a registration that was refused.
    fn refused(&self, verb: Verb, name: &str, status: &Status) {
        let explain = &self.tenant.explain;
        explain.request_refused(&self.identity, verb, name, status);
    }

    /// Whether a service or model may be registered under this id.
    fn may_register(&self, id: u32, verb: Verb, name: &TopicName) -> Result<(), Status> {
        if id == 0 {
            return Err(invalid("registration id 0: expected a positive number"));
        }
        if self.services.contains_key(&id) || self.models.contains_key(&id) {
            return Err(Status::new(
                Code::AlreadyExists,
                format!("the registration id {id} is in use on this connection"),
            ));
        }
        let most = self.fabric.limits.registrations_per_session;
        if self.services.len() + self.models.len() >= most {
            return Err(Status::new(
                Code::ResourceExhausted,
                format!("the connection has {most} registrations, the most it may"),
            ));
        }
        match self.policy.now().decide(verb, name) {
            Decision::Allowed { .. } => Ok(()),
            Decision::Denied(denial) => {
                self.fabric.metrics.deny(verb.as_str());
                Err(denial.into())
            }
        }
    }
}

fn invalid(message: &str) -> Status {
    Status::new(Code::InvalidArgument, message)
}
