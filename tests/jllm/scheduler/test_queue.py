from jllm.scheduler.queue import WaitingQueue
from jllm.scheduler.request import Request, RequestStatus


def request(number, priority=0):
    return Request(
        sequence_id=number,
        request_id=str(number),
        index=0,
        prompt_token_ids=(1,),
        max_tokens=1,
        priority=priority,
        arrival=number,
    )


def end(queue, one):
    one.status = RequestStatus.FINISHED
    queue.note_ended()


def test_serves_by_priority_then_arrival():
    queue = WaitingQueue()
    for one in (request(2), request(1), request(3, priority=-1)):
        queue.push(one)
    assert [queue.pop().sequence_id for _ in range(3)] == [3, 1, 2]
    assert queue.peek() is None


def test_skips_sequences_that_have_ended():
    queue = WaitingQueue()
    requests = [request(number) for number in range(5)]
    for one in requests:
        queue.push(one)
    end(queue, requests[0])
    assert queue.peek() is requests[1]
    assert queue.peek() is requests[1]
    assert queue.pop() is requests[1]


def test_ended_sequences_do_not_pile_up():
    queue = WaitingQueue()
    first = request(0)
    queue.push(first)
    for number in range(1, 1000):
        one = request(number, priority=1)
        queue.push(one)
        end(queue, one)
        assert len(queue._heap) <= 4
    assert queue.requests() == [first]
