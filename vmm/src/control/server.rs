//! The clients of the control socket, in the main loop.

use std::io;

use devices::event::{EventSet, Watch};
use devices::host::listener::Listener;
use serde_json::Value;

use super::client::{Client, Gone};
use super::interface::{Interface, Occasion};

/// Clients at a time. A further one takes the place of the one that has been quiet for the longest
/// time, so that nobody can keep others out.
const CLIENTS_MAX: usize = 32;

/// Clients that are let in before others have their turn.
const ARRIVALS_PER_TURN: usize = 8;

/// Serves an [`Interface`] to clients. The handler that owns it passes on what is ready.
pub(crate) struct Server {
    listener: Listener,
    clients: [Option<Place>; CLIENTS_MAX],
    /// The token of the listener; those of clients follow.
    first_token: u32,
    /// Counts turns, so that it is known who has been quiet.
    turn: u64,
}

struct Place {
    client: Client,
    last_turn: u64,
    watched: EventSet,
    /// The event of a stream is watched, too.
    watches_stream: bool,
}

impl Server {
    /// Serves whoever connects to `listener`, with tokens from `first_token` on.
    pub(crate) fn new(listener: Listener, first_token: u32) -> Self {
        let clients = [const { None }; CLIENTS_MAX];
        Self { listener, clients, first_token, turn: 0 }
    }

    /// Begins to wait for clients.
    pub(crate) fn start(&self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        watch.add(&self.listener, self.first_token, EventSet::IN)
    }

    /// Serves what is ready.
    pub(crate) fn ready<S>(
        &mut self,
        token: u32,
        readiness: EventSet,
        watch: &mut Watch<'_, '_>,
        interface: &Interface<S>,
        subject: &mut S,
    ) {
        self.turn = self.turn.wrapping_add(1);
        match token.checked_sub(self.first_token).map(usize::try_from) {
            Some(Ok(0)) => self.admit(watch),
            Some(Ok(number @ 1..=CLIENTS_MAX)) => {
                self.serve(number - 1, watch, |client| client.go_on(interface, subject, readiness));
            }
            // The event of a stream says nothing of the socket.
            Some(Ok(number)) => self.serve(number - 1 - CLIENTS_MAX, watch, |client| {
                client.go_on(interface, subject, EventSet::empty())
            }),
            _ => {}
        }
    }

    /// Tells an event to all who want to know.
    pub(crate) fn announce(&mut self, event: &Value, watch: &mut Watch<'_, '_>) {
        for index in self.indices(Client::wants_events) {
            self.serve(index, watch, |client| {
                client.announce(event)?;
                client.flush_replies()
            });
        }
    }

    /// Replies to all who have waited for `occasion`.
    pub(crate) fn complete(&mut self, occasion: Occasion, watch: &mut Watch<'_, '_>) {
        for index in self.indices(|client| client.waits_for(occasion)) {
            self.serve(index, watch, |client| {
                client.complete();
                client.flush_replies()
            });
        }
    }

    fn indices(&self, is_meant: impl Fn(&Client) -> bool) -> Vec<usize> {
        let places = self.clients.iter().enumerate();
        let meant =
            places.filter(|(_, place)| place.as_ref().is_some_and(|place| is_meant(&place.client)));
        meant.map(|(index, _)| index).collect()
    }

    fn admit(&mut self, watch: &mut Watch<'_, '_>) {
        for _ in 0..ARRIVALS_PER_TURN {
            let client = match self.listener.accept() {
                Ok(Some(client)) => Client::new(client),
                Ok(None) => return,
                Err(error) => return self.make_room(&error, watch),
            };
            let index = self.quietest();
            self.serve(index, watch, |_| Err(Gone));
            if let Err(error) = watch.add(&client, self.token(index), EventSet::IN) {
                log::warn!("a control client cannot be served: {error}");
            } else if let Some(place) = self.clients.get_mut(index) {
                *place = Some(Place {
                    client,
                    last_turn: self.turn,
                    watched: EventSet::IN,
                    watches_stream: false,
                });
            }
        }
    }

    /// There is no descriptor left for the client that waits: another one leaves.
    fn make_room(&mut self, error: &io::Error, watch: &mut Watch<'_, '_>) {
        let index = self.quietest();
        if self.clients.get(index).is_some_and(Option::is_some) {
            return self.serve(index, watch, |_| Err(Gone));
        }
        // The loop would be told of the waiting client again and again.
        log::error!("nobody can be let in to the control socket any more: {error}");
        let _ = watch.remove(&self.listener);
    }

    /// The place for one more client: a free one, or that of the client who is to leave.
    fn quietest(&self) -> usize {
        let quietness = |place: &Option<Place>| {
            place.as_ref().map(|place| (place.client.is_waiting(), place.last_turn))
        };
        // A free place comes before all others, and those who are quiet by right come last.
        let quietest = self.clients.iter().enumerate().min_by_key(|(_, place)| quietness(place));
        quietest.map_or(0, |(index, _)| index)
    }

    /// Has a client do something, and watches what it asks for from then on, or nothing more.
    fn serve(
        &mut self,
        index: usize,
        watch: &mut Watch<'_, '_>,
        act: impl FnOnce(&mut Client) -> Result<EventSet, Gone>,
    ) {
        let (token, stream_token) = (self.token(index), self.token(CLIENTS_MAX + index));
        let Some(slot) = self.clients.get_mut(index) else { return };
        let Some(place) = slot else { return };
        place.last_turn = self.turn;
        let wish = act(&mut place.client).ok();
        let stays =
            wish.is_some_and(|interest| place.watch(interest, token, stream_token, watch).is_ok());
        if !stays {
            // A file that cannot be removed is not watched.
            if let Some(attention) = place.client.attention().filter(|_| place.watches_stream) {
                let _ = watch.remove(attention);
            }
            let _ = watch.remove(&place.client);
            *slot = None;
        }
    }

    /// The token of the socket at `index`, or of a stream where it is [`CLIENTS_MAX`] more.
    fn token(&self, index: usize) -> u32 {
        let number = u32::try_from(index).unwrap_or(u32::MAX);
        self.first_token.saturating_add(1).saturating_add(number)
    }
}

impl Place {
    /// Watches the client's socket for `interest`, and the stream that it has come to carry.
    fn watch(
        &mut self,
        interest: EventSet,
        token: u32,
        stream_token: u32,
        watch: &mut Watch<'_, '_>,
    ) -> io::Result<()> {
        if !self.watches_stream
            && let Some(attention) = self.client.attention()
        {
            watch.add(attention, stream_token, EventSet::IN)?;
            self.watches_stream = true;
        }
        if interest != self.watched {
            watch.modify(&self.client, token, interest)?;
            self.watched = interest;
        }
        Ok(())
    }
}
