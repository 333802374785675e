//! What the next incarnation has to know, in the memory that the vault keeps: two counters a queue and one mark for each command in flight.
//!
//! ```text
//!   submit    list page, command -> mark[place] = sequence, id -> submitted = sequence -> doorbell
//!   complete  entry read         -> mark[place] = 0            -> completed += 1       -> doorbell
//! ```
//! A driver may be killed between any two of these stores. They become visible in their order (release stores; a doorbell is behind a
//! full fence), so its successor finds:
//! * `mark > submitted`: the command was never counted, so no doorbell told the device of it. The mark is void.
//! * `mark <= submitted`, but the doorbell was not rung: the command looks as if it were in flight. The successor's first command (a flush)
//!   goes into the next slot, its doorbell tells of both, and never has the value that the device has already.
//! * mark 0, but the completion is not counted: the successor reads that entry again and finds no such command. It accepts this for the
//!   first entry that it takes, and never again ([`crate::queue::QueuePair::adopt`]).
//!
//! Head, tail and phase follow from the counters. The queue's memory itself is what the device goes on using.

use uhmm_kernel_hook::{HookError, Window};

use crate::layout::Layout;
use crate::machine::Flight;
use crate::protocol::QueueId;
use crate::queue::{Placed, QueuePair};

const MAGIC: u64 = u64::from_le_bytes(*b"uhmmnvme");
const VERSION: u64 = 1;
const AT_MAGIC: u64 = 0;
const AT_VERSION: u64 = 8;
const AT_LAYOUT: u64 = 16;
const AT_IOVA: u64 = 24;
const AT_NAMESPACE: u64 = 32;
const AT_PAIRS: u64 = 40;
const AT_OWNER: u64 = 48;
const AT_GENERATION: u64 = 64;
const SUBMITTED: u64 = 0;
const COMPLETED: u64 = 8;
const MARKS: u64 = 64;

/// Who has the namespace, and which of its lives this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    /// Drawn when the namespace was taken.
    pub owner: [u64; 2],
    /// Drawn with it; names what the frames hold.
    pub generation: u64,
}

/// The state pages; see the module head.
#[derive(Clone, Copy, Debug)]
pub struct Book<'a> {
    window: &'a Window,
    layout: Layout,
}

/// What the pages of an earlier incarnation say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// How the memory is divided.
    pub layout: Layout,
    /// Where it is for the device.
    pub iova: u64,
    /// Which namespace.
    pub namespace: u32,
    /// Pairs of I/O queues that can be gone on with; 0: none, the controller was being set up.
    pub pairs: u16,
}

impl<'a> Book<'a> {
    /// Over memory of [`Layout::len_bytes`].
    pub fn new(window: &'a Window, layout: Layout) -> Self {
        Self { window, layout }
    }

    /// Reads page 0; `None` when it is not ours.
    ///
    /// # Errors
    /// The window is too short.
    pub fn find(window: &Window) -> Result<Option<Found>, HookError> {
        if window.load_u64(AT_MAGIC)? != MAGIC || window.load_u64(AT_VERSION)? != VERSION {
            return Ok(None);
        }
        let shape = window.load_u64(AT_LAYOUT)?;
        let layout = Layout { entries: shape as u16, pairs: (shape >> 16) as u16 };
        let found = Found {
            layout,
            iova: window.load_u64(AT_IOVA)?,
            namespace: window.load_u64(AT_NAMESPACE)? as u32,
            pairs: window.load_u64(AT_PAIRS)? as u16,
        };
        let legal = layout.pairs >= 1 && layout.entries >= 4 && found.pairs <= layout.pairs;
        Ok((legal && window.len() == layout.len_bytes()).then_some(found))
    }

    /// Begins page 0 of new memory.
    ///
    /// # Errors
    /// The window is too short.
    pub fn begin(&self, iova: u64, namespace: u32) -> Result<(), HookError> {
        self.window.store_u64(AT_MAGIC, 0)?;
        self.window.store_u64(AT_PAIRS, 0)?;
        self.window.store_u64(AT_GENERATION, 0)?;
        self.window.store_u64(AT_LAYOUT, u64::from(self.layout.entries) | u64::from(self.layout.pairs) << 16)?;
        self.window.store_u64(AT_IOVA, iova)?;
        self.window.store_u64(AT_NAMESPACE, u64::from(namespace))?;
        self.window.store_u64(AT_VERSION, VERSION)?;
        self.window.store_u64(AT_MAGIC, MAGIC)
    }

    /// A next incarnation may go on with this many pairs.
    ///
    /// # Errors
    /// As [`Book::begin`].
    pub fn set_adoptable(&self, pairs: u16) -> Result<(), HookError> {
        self.window.store_u64(AT_PAIRS, u64::from(pairs))
    }

    /// What the namespace holds, if that was noted.
    ///
    /// # Errors
    /// As [`Book::begin`].
    pub fn content(&self) -> Result<Option<Content>, HookError> {
        let generation = self.window.load_u64(AT_GENERATION)?;
        let owner = [self.window.load_u64(AT_OWNER)?, self.window.load_u64(AT_OWNER + 8)?];
        Ok((generation != 0).then_some(Content { owner, generation }))
    }

    /// Notes what the namespace holds, after its header says the same.
    ///
    /// # Errors
    /// As [`Book::begin`].
    pub fn set_content(&self, content: Content) -> Result<(), HookError> {
        self.window.store_u64(AT_GENERATION, 0)?;
        self.window.store_u64(AT_OWNER, content.owner[0])?;
        self.window.store_u64(AT_OWNER + 8, content.owner[1])?;
        self.window.store_u64(AT_GENERATION, content.generation)
    }

    /// A command is in its slot; the doorbell comes next.
    ///
    /// # Errors
    /// As [`Book::begin`].
    pub fn submitted(&self, queue: QueueId, placed: &Placed) -> Result<(), HookError> {
        let page = self.layout.queue_state(queue);
        let mark = placed.sequence << 16 | u64::from(placed.id);
        self.window.store_u64(page + MARKS + 8 * u64::from(placed.place), mark)?;
        self.window.store_u64(page + SUBMITTED, placed.sequence)
    }

    /// A completion was taken.
    ///
    /// # Errors
    /// As [`Book::begin`].
    pub fn completed(&self, queue: QueueId, place: Option<u16>, completed: u64) -> Result<(), HookError> {
        let page = self.layout.queue_state(queue);
        if let Some(place) = place {
            self.window.store_u64(page + MARKS + 8 * u64::from(place), 0)?;
        }
        self.window.store_u64(page + COMPLETED, completed)
    }

    /// Rings, counters and marks of all queues become zero. The controller is off.
    ///
    /// # Errors
    /// As [`Book::begin`].
    pub fn clear_queues(&self) -> Result<(), HookError> {
        for queue in (0..=self.layout.pairs).map(QueueId) {
            let (rings, len) = self.layout.rings(queue);
            self.window.fill(rings, len, 0)?;
            self.window.fill(self.layout.queue_state(queue), crate::layout::PAGE, 0)?;
        }
        Ok(())
    }

    /// A queue as the last incarnation left it. Void marks are cleared.
    ///
    /// # Errors
    /// As [`Book::begin`].
    pub fn adopt_queue(&self, queue: QueueId) -> Result<QueuePair<Flight>, HookError> {
        let page = self.layout.queue_state(queue);
        let submitted = self.window.load_u64(page + SUBMITTED)?;
        let completed = self.window.load_u64(page + COMPLETED)?;
        let mut in_flight = Vec::new();
        for place in 0..self.layout.entries - 2 {
            let at = page + MARKS + 8 * u64::from(place);
            let mark = self.window.load_u64(at)?;
            if mark >> 16 > submitted {
                self.window.store_u64(at, 0)?;
            } else if mark != 0 {
                in_flight.push((place, mark as u16));
            }
        }
        Ok(QueuePair::adopt(queue, self.layout.entries, submitted, completed, &in_flight, Flight::orphan))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout = Layout { entries: 8, pairs: 1 };
    const QUEUE: QueueId = QueueId(1);

    fn window() -> Window {
        Window::anonymous(LAYOUT.len_bytes()).unwrap()
    }

    fn placed(place: u16, sequence: u64) -> Placed {
        Placed { slot: ((sequence - 1) % 8) as u16, place, id: 0x0100 | place, sequence }
    }

    #[test]
    fn pages_of_somebody_else_are_not_taken() {
        let window = window();
        assert_eq!(Book::find(&window).unwrap(), None);
        let book = Book::new(&window, LAYOUT);
        book.begin(0x40_0000, 3).unwrap();
        book.set_adoptable(1).unwrap();
        let found = Found { layout: LAYOUT, iova: 0x40_0000, namespace: 3, pairs: 1 };
        assert_eq!(Book::find(&window).unwrap(), Some(found));
        window.store_u64(AT_LAYOUT, 9 | 1 << 16).unwrap();
        assert_eq!(Book::find(&window).unwrap(), None, "a layout of another size");
    }

    #[test]
    fn the_content_is_known_when_all_of_it_was_noted() {
        let window = window();
        let book = Book::new(&window, LAYOUT);
        book.begin(0x1000, 1).unwrap();
        assert_eq!(book.content().unwrap(), None);
        let content = Content { owner: [5, 6], generation: 7 };
        book.set_content(content).unwrap();
        assert_eq!(book.content().unwrap(), Some(content));
    }

    #[test]
    fn a_killed_driver_leaves_a_queue_that_can_be_gone_on_with() {
        let window = window();
        let book = Book::new(&window, LAYOUT);
        for sequence in 1..=9 {
            book.submitted(QUEUE, &placed((sequence % 6) as u16, sequence)).unwrap();
            book.completed(QUEUE, Some((sequence % 6) as u16), sequence).unwrap();
        }
        book.submitted(QUEUE, &placed(2, 10)).unwrap();
        // Killed between mark and counter.
        let page = LAYOUT.queue_state(QUEUE);
        window.store_u64(page + MARKS + 8 * 4, 11 << 16 | 0x0104).unwrap();
        let mut adopted = book.adopt_queue(QUEUE).unwrap();
        assert_eq!((adopted.tail(), adopted.head(), adopted.phase()), (2, 1, false));
        assert_eq!(adopted.owners().map(|(id, _)| id).collect::<Vec<_>>(), [0x0102]);
        assert_eq!(window.load_u64(page + MARKS + 8 * 4).unwrap(), 0, "or the third incarnation would wait for it");
        // Killed between the mark's end and the counter.
        window.store_u64(page + MARKS + 8 * 2, 0).unwrap();
        let mut adopted = book.adopt_queue(QUEUE).unwrap();
        assert_eq!((adopted.in_flight(), adopted.owners().count(), adopted.head()), (0, 0, 1));
    }

    #[test]
    fn cleared_queues_begin_anew() {
        let window = window();
        let book = Book::new(&window, LAYOUT);
        book.submitted(QUEUE, &placed(2, 10)).unwrap();
        window.fill(LAYOUT.completion(QUEUE), 128, 0xff).unwrap();
        book.clear_queues().unwrap();
        assert_eq!(book.adopt_queue(QUEUE).unwrap().in_flight(), 0);
        assert_eq!(window.load_u64(LAYOUT.completion(QUEUE) + 8).unwrap(), 0);
    }
}
