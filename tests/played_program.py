"""A program of a Gluon kernel as threads, one for each partition: mbarriers, and the hardware barriers of slots."""

from __future__ import annotations

import threading

PATIENCE = 60  # seconds that a thread waits, before it is taken to wait for ever


class Barrier:
    """An mbarrier."""

    def __init__(self):
        self.count, self.arrived, self.bytes, self.completed = None, 0, 0, 0
        self.under_way = []  # what TMA brings


class Barriers:
    def __init__(self, count: int):
        self.each = [Barrier() for _ in range(count)]

    def index(self, i):
        return self.each[int(i)]


class Program:
    """One program's barriers, and who waits at them."""

    def __init__(self, number: tuple[int, ...], count: tuple[int, ...], late: bool):
        self.number, self.count, self.late = number, count, late
        self.condition, self.returned, self.failed = threading.Condition(threading.RLock()), {}, []

    def wait(self, there) -> None:
        with self.condition:
            assert self.condition.wait_for(lambda: self.failed or there(), PATIENCE), "waits for ever"
            assert not self.failed, "another partition failed"

    def arrive(self, barrier, tx: int = 0, arrivals: int = 1) -> None:
        with self.condition:
            barrier.bytes += tx
            barrier.arrived += arrivals
            assert barrier.arrived <= barrier.count
            if barrier.arrived == barrier.count and barrier.bytes == 0:
                barrier.arrived, barrier.completed = 0, barrier.completed + 1
            self.condition.notify_all()

    def bring(self, barrier, load) -> None:
        with self.condition:
            barrier.under_way.append(load)
            if not self.late:
                self.land(barrier)
            self.condition.notify_all()

    def land(self, barrier) -> None:
        while barrier.under_way:
            self.arrive(barrier, -barrier.under_way.pop()(), 0)

    def await_phase(self, barrier, phase) -> None:
        def there():
            self.land(barrier)
            return barrier.completed & 1 != int(phase)

        self.wait(there)

    def give_back(self, slot, variant) -> None:
        with self.condition:
            there = self.returned.setdefault(int(slot), set())
            assert threading.current_thread().name not in there, "a consumer gives a slot back twice"
            there.add(threading.current_thread().name)
            self.condition.notify_all()

    def wait_returned(self, slot, variant) -> None:
        self.wait(lambda: len(self.returned.get(int(slot), ())) == variant.consumers)
        self.returned[int(slot)].clear()

    def specialize(self, partitions, *_) -> None:
        def run(function, arguments):
            running.program = self
            try:
                function(*arguments)
            except BaseException as error:  # told by the thread that started this one
                with self.condition:
                    self.failed.append(error)
                    self.condition.notify_all()

        threads = [threading.Thread(target=run, args=part, name=str(i)) for i, part in enumerate(partitions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failed:
            raise self.failed[0]
        assert not any(self.returned.values()), "barriers are not as they were found"


running = threading.local()
