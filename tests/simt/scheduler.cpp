#include "scheduler.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "fault.h"
#include "guarded_copies.h"

namespace simt {

Running running;
Scheduler* scheduler = nullptr;

namespace {

constexpr uint64_t kMaxPreemptions = uint64_t{1} << 25;  // without any other progress

Policy policy_of(uint64_t seed, Random& random) {
    if (seed == 0) return {};
    constexpr unsigned kStay[] = {32, 56, 63}, kContenders[] = {1, 2, 8}, kPreempt[] = {8, 32, 60};
    Policy policy;
    policy.is_in_order = false;
    policy.stay = kStay[seed % 3];
    policy.contenders = kContenders[random.below(3)];
    policy.preempt = kPreempt[random.below(3)];
    policy.is_by_block = random.below(2) != 0;
    return policy;
}

std::string text_of(const Site& site) {
    return std::string(site.file) + ":" + std::to_string(site.line);
}

void begin_fiber() {
    scheduler->finish_fiber();
}

}  // namespace

std::string text_of(const uint3& index) {
    return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
           std::to_string(index.z) + ")";
}

void fail(const std::string& text) {
    scheduler->fail(*running.thread, text);
}

int ReadySet::next(unsigned from) const {
    const size_t count = words_.size(), first = from / 64;
    for (size_t i = 0; i <= count; ++i) {
        const size_t at = (first + i) % count;
        uint64_t word = words_[at];
        if (i == 0) word &= ~uint64_t{0} << from % 64;
        if (word) return static_cast<int>(at * 64) + __builtin_ctzll(word);
    }
    return -1;
}

Scheduler::Scheduler(const LaunchSpec& spec, const Settings& settings, StackPool& stacks,
                     std::vector<std::unique_ptr<SharedArena>>& arenas)
    : spec_(spec),
      is_strict_(settings.is_strict),
      arithmetic_(settings.arithmetic),
      random_(settings.seed),
      stacks_(stacks) {
    policy_ = policy_of(settings.seed, random_);
    const size_t num_blocks = size_t{spec.grid.x} * spec.grid.y * spec.grid.z;
    const unsigned block_size = spec.block.x * spec.block.y * spec.block.z;
    order_.resize(num_blocks);
    std::iota(order_.begin(), order_.end(), 0u);
    if (!policy_.is_in_order)
        for (size_t i = num_blocks; i > 1; --i)
            std::swap(order_[i - 1], order_[random_.below(static_cast<uint32_t>(i))]);
    blocks_.resize(std::min<size_t>(settings.resident_blocks, num_blocks));
    warps_per_block_ = (block_size + 31) / 32;
    ready_.resize(blocks_.size() * warps_per_block_);
    stacks_.reserve(blocks_.size() * block_size);
    for (size_t i = 0; i < blocks_.size(); ++i) {
        Block& block = blocks_[i];
        block.threads.resize(block_size);
        block.warps.resize(warps_per_block_);
        if (i == arenas.size()) arenas.push_back(nullptr);
        if (!arenas[i] || arenas[i]->max_bytes() != settings.shared_bytes)
            arenas[i] = std::make_unique<SharedArena>(settings.shared_bytes);
        block.shared = arenas[i].get();
    }
}

void Scheduler::run() {
    running.block_dim = spec_.block;
    running.grid_dim = spec_.grid;
    for (Block& block : blocks_) admit(block);
    run_to_wait();
    run_ready();
    for (const Block& block : blocks_)
        if (block.num_exited < block.threads.size()) fail_deadlock();
}

void Scheduler::run_ready() {
    while (Thread* next = pick()) {
        running.thread = next;
        running.thread_index = next->index;
        running.block_index = next->block->index;
        simt_switch_context(&main_, next->stack_pointer);
        running.thread = nullptr;
        check_after_switch();
        if (finished_) retire(*finished_);
    }
}

void Scheduler::check_after_switch() {
    if (fault_.has_come) fail(*fault_.thread, describe_fault());
    if (!failure_.empty()) throw std::runtime_error(failure_);
}

void Scheduler::admit(Block& block) {
    const size_t slot = &block - blocks_.data(), size = block.threads.size();
    const unsigned number = order_[num_admitted_++];
    block.index = {number % spec_.grid.x, number / spec_.grid.x % spec_.grid.y,
                   number / spec_.grid.x / spec_.grid.y};
    block.num_arrived = block.num_true = block.num_exited = 0;
    block.first_arrived = block.first_exited = nullptr;
    block.shared->begin_block(spec_.shared_bytes);
    const uint32_t block_priority = random_.next() << 8;
    for (unsigned i = 0; i < size; ++i) {
        Thread& thread = block.threads[i];
        thread.stack_pointer = make_context(stacks_.top(slot * size + i), begin_fiber);
        thread.index = {i % spec_.block.x, i / spec_.block.x % spec_.block.y,
                        i / spec_.block.x / spec_.block.y};
        thread.lane = i % 32;
        thread.warp = &block.warps[i / 32];
        thread.block = &block;
        thread.has_waited = false;
    }
    for (unsigned w = 0; w < warps_per_block_; ++w) {
        Warp& warp = block.warps[w];
        const size_t lanes = std::min<size_t>(32, size - w * 32);
        warp.threads = &block.threads[w * 32];
        warp.slot = static_cast<unsigned>(slot) * warps_per_block_ + w;
        warp.alive = lanes == 32 ? ~0u : (1u << lanes) - 1;
        warp.ready = warp.at_barrier = warp.at_wait = warp.meeting = warp.exited = 0;
        warp.priority = policy_.is_by_block ? block_priority + random_.below(256) : random_.next();
        warp.last_lane = 31;
        make_ready(warp, warp.alive);
    }
}

void Scheduler::retire(Block& block) {
    finished_ = nullptr;
    const std::string overwritten = block.shared->overwritten();
    if (!overwritten.empty())
        throw std::runtime_error("kernel " + std::string(spec_.name) + ", block " +
                                 text_of(block.index) + ": " + overwritten);
    if (num_admitted_ == order_.size()) return;
    const ReadySet others = spec_.overlaps ? ready_.take() : ReadySet();
    admit(block);
    if (!spec_.overlaps) return;
    run_to_wait();
    ready_.insert(others);
}

// --- The launch before --------------------------------------------------------------------------

// What a launch that overlaps does while the one before it still runs: its new blocks, the only
// ready ones, come as far as they can without what that one may read or write. Others, which are
// past their wait, stand still meanwhile.
void Scheduler::run_to_wait() {
    if (!spec_.overlaps) return;
    is_early_ = true;
    {
        const WithheldCopies withheld;
        run_ready();
    }
    is_early_ = false;
    for (Block& block : blocks_)
        for (Warp& warp : block.warps) make_ready(warp, std::exchange(warp.at_wait, 0));
}

void Scheduler::wait_for_previous() {
    Thread& me = *running.thread;
    me.has_waited = true;
    if (!is_early_) return;
    me.warp->at_wait |= 1u << me.lane;
    switch_out(me);
}

// --- Who runs next ------------------------------------------------------------------------------

void Scheduler::make_ready(Warp& warp, uint32_t lanes) {
    warp.ready |= lanes;
    if (warp.ready) ready_.insert(warp.slot);
}

Warp* Scheduler::choose_warp() {
    const auto from = [&](unsigned slot) -> Warp* {
        const int next = ready_.next(slot);
        if (next < 0) return nullptr;
        return &blocks_[next / warps_per_block_].warps[next % warps_per_block_];
    };
    if (policy_.is_in_order) return from(slot_);
    Warp& last = blocks_[slot_ / warps_per_block_].warps[slot_ % warps_per_block_];
    if (last.ready && random_.below(64) < policy_.stay) return &last;
    const auto num_slots = static_cast<uint32_t>(blocks_.size()) * warps_per_block_;
    Warp* best = from(random_.below(num_slots));
    for (unsigned i = 1; best && i < policy_.contenders; ++i) {
        Warp* other = from(random_.below(num_slots));
        if (other->priority > best->priority) best = other;
    }
    return best;
}

Thread* Scheduler::pick() {
    Warp* warp = choose_warp();
    if (!warp) return nullptr;
    const unsigned first =
        (policy_.is_in_order ? warp->last_lane + 1 : random_.next()) % 32;  // of 32, going around
    const uint32_t rotated =
        first ? warp->ready >> first | warp->ready << (32 - first) : warp->ready;
    const unsigned lane = (first + static_cast<unsigned>(__builtin_ctz(rotated))) % 32;
    warp->ready &= ~(1u << lane);
    if (!warp->ready) ready_.erase(warp->slot);
    warp->last_lane = lane;
    slot_ = warp->slot;
    return &warp->threads[lane];
}

void Scheduler::switch_out(Thread& me) {
    Thread* next = pick();
    if (next == &me) return;
    running.thread = next;
    if (!next) return simt_switch_context(&me.stack_pointer, main_);
    running.thread_index = next->index;
    running.block_index = next->block->index;
    simt_switch_context(&me.stack_pointer, next->stack_pointer);
}

void Scheduler::maybe_switch_out(Thread& me) {
    if (policy_.is_in_order || random_.below(64) >= policy_.preempt) return;
    make_ready(*me.warp, 1u << me.lane);
    switch_out(me);
}

// In order, a thread goes on through most atomics, but one that spins must let the others run.
void Scheduler::preempt() {
    Thread& me = *running.thread;
    if (++num_preempted_ == kMaxPreemptions)
        simt::fail("livelock: threads spin on atomics and nobody gets on");
    if (!policy_.is_in_order) return maybe_switch_out(me);
    if (num_preempted_ % 64 != 0) return;
    make_ready(*me.warp, 1u << me.lane);
    slot_ = (slot_ + 1) % (static_cast<unsigned>(blocks_.size()) * warps_per_block_);
    switch_out(me);
}

// --- Barriers of a block ------------------------------------------------------------------------

void Scheduler::check_barrier(const Thread& me) const {
    const Block& block = *me.block;
    if (!is_strict_) return;
    const std::string here = "divergent barrier: this thread waits at __syncthreads, ";
    if (block.first_exited)
        fail(me, here + text_of(me.site) + ", but thread " + text_of(block.first_exited->index) +
                     " of the block has exited");
    const Thread* first = block.first_arrived;
    if (first && (first->site.line != me.site.line ||
                  std::string(first->site.file) != std::string(me.site.file)))
        fail(me, here + text_of(me.site) + ", but thread " + text_of(first->index) +
                     " of the block waits at " + text_of(first->site));
}

void Scheduler::open_barrier(Block& block) {
    block.result = {block.num_true, block.num_arrived};
    block.num_arrived = block.num_true = 0;
    block.first_arrived = nullptr;
    num_preempted_ = 0;
    for (Warp& warp : block.warps) {
        make_ready(warp, warp.at_barrier);
        warp.at_barrier = 0;
    }
}

BarrierResult Scheduler::barrier(bool vote, Site site) {
    Thread& me = *running.thread;
    Block& block = *me.block;
    me.site = site;
    check_barrier(me);
    if (!block.first_arrived) block.first_arrived = &me;
    block.num_true += vote;
    if (++block.num_arrived + block.num_exited == block.threads.size()) {
        open_barrier(block);
        maybe_switch_out(me);
    } else {
        me.warp->at_barrier |= 1u << me.lane;
        switch_out(me);
    }
    return block.result;  // the next barrier opens only once this thread is there
}

// --- Operations of a warp -----------------------------------------------------------------------

void Scheduler::check_meeting(const Thread& me, const char* what, uint32_t mask) const {
    const Warp& warp = *me.warp;
    const uint32_t bit = 1u << me.lane;
    const auto hex = [](uint32_t value) {
        char text[16];
        std::snprintf(text, sizeof text, "0x%08x", value);
        return std::string(text);
    };
    const auto me_with = [&] { return std::string(what) + " with mask " + hex(mask); };
    if (!(mask & bit))
        fail(me, me_with() + " by lane " + std::to_string(me.lane) + ", which is not in it");
    if (is_strict_ && (mask & warp.exited))
        fail(me, me_with() + ", which names lane " +
                     std::to_string(__builtin_ctz(mask & warp.exited)) + ", which has exited");
    // Lanes that wait for the same meeting agree, so one of them speaks for all.
    for (uint32_t others = warp.meeting & mask; others; others = 0) {
        const int lane = __builtin_ctz(others);
        const Meeting& other = warp.at[lane];
        if (other.mask != mask)
            fail(me, "lanes disagree on the mask: " + me_with() + ", but lane " +
                         std::to_string(lane) + " waits at " + other.what + " with mask " +
                         hex(other.mask));
        if (other.what != what)
            fail(me, "lanes meet at different operations: " + me_with() + ", but lane " +
                         std::to_string(lane) + " waits at " + other.what);
    }
    for (uint32_t others = warp.meeting & ~mask; is_strict_ && others; others &= others - 1) {
        const int lane = __builtin_ctz(others);
        const Meeting& other = warp.at[lane];
        if ((other.mask & bit) && other.what == what)
            fail(me, "lanes disagree on the mask: " + me_with() + ", but lane " +
                         std::to_string(lane) + " waits there with mask " + hex(other.mask));
    }
}

void Scheduler::finish_meeting(Warp& warp, uint32_t lanes) {
    warp.at[__builtin_ctz(lanes)].combine(warp, lanes);
    warp.meeting &= ~lanes;
    num_preempted_ = 0;
}

void Scheduler::meet(const char* what, uint32_t mask, Meeting::Combine combine, const void* in,
                     void* out) {
    Thread& me = *running.thread;
    Warp& warp = *me.warp;
    check_meeting(me, what, mask);
    warp.at[me.lane] = {what, mask, combine, in, out};
    warp.meeting |= 1u << me.lane;
    const uint32_t needed = mask & warp.alive;
    if ((warp.meeting & needed) != needed) return switch_out(me);
    finish_meeting(warp, needed);
    make_ready(warp, needed & ~(1u << me.lane));
    maybe_switch_out(me);
}

// --- The end of a thread ------------------------------------------------------------------------

void Scheduler::finish_meetings_after_exit(Warp& warp) {
    for (uint32_t waiting = warp.meeting; waiting;) {
        const uint32_t needed = warp.at[__builtin_ctz(waiting)].mask & warp.alive;
        waiting &= ~needed;
        if ((warp.meeting & needed) != needed) continue;
        finish_meeting(warp, needed);
        make_ready(warp, needed);
    }
}

void Scheduler::exit_thread(Thread& me) {
    me.copies.check_none_left();
    Block& block = *me.block;
    Warp& warp = *me.warp;
    const uint32_t bit = 1u << me.lane;
    if (spec_.overlaps && !me.has_waited)
        fail(me, "this thread ends without wait_for_previous(), in a launch that overlaps");
    if (is_strict_ && block.num_arrived)
        fail(me, "divergent barrier: this thread exited, but thread " +
                     text_of(block.first_arrived->index) + " of the block waits at " +
                     text_of(block.first_arrived->site));
    for (uint32_t others = warp.meeting; is_strict_ && others; others &= others - 1) {
        const int lane = __builtin_ctz(others);
        if (warp.at[lane].mask & bit)
            fail(me, "this thread exited, but lane " + std::to_string(lane) +
                         " of its warp waits for it at " + warp.at[lane].what);
    }
    warp.alive &= ~bit;
    warp.exited |= bit;
    if (!block.first_exited) block.first_exited = &me;
    ++block.num_exited;
    num_preempted_ = 0;
    if (block.num_arrived && block.num_arrived + block.num_exited == block.threads.size())
        open_barrier(block);
    finish_meetings_after_exit(warp);
    if (block.num_exited == block.threads.size()) finished_ = &block;
}

void Scheduler::finish_fiber() {
    try {
        (*spec_.body)();
        exit_thread(*running.thread);
    } catch (const std::exception& error) {
        failure_ = error.what();
    }
    Thread& me = *running.thread;
    if (finished_ || !failure_.empty()) simt_switch_context(&me.stack_pointer, main_);
    switch_out(me);
    __builtin_unreachable();
}

// --- Errors -------------------------------------------------------------------------------------

void Scheduler::fail(const Thread& thread, const std::string& text) const {
    throw std::runtime_error("kernel " + std::string(spec_.name) + ", block " +
                             text_of(thread.block->index) + ", thread " + text_of(thread.index) +
                             ": " + text);
}

void Scheduler::fail_deadlock() const {
    for (const Block& block : blocks_) {
        for (const Thread& thread : block.threads) {
            const Warp& warp = *thread.warp;
            const uint32_t bit = 1u << thread.lane;
            if (warp.meeting & bit)
                fail(thread, "deadlock: this thread waits at " +
                                 std::string(warp.at[thread.lane].what) +
                                 " for lanes that never come");
        }
        if (block.num_arrived)
            fail(*block.first_arrived, "deadlock: this thread waits at __syncthreads, " +
                                           text_of(block.first_arrived->site) +
                                           ", for threads that never come");
    }
    throw std::logic_error("simt: no thread is ready and none waits");
}

void Scheduler::abandon_fiber(void* address, bool is_write) {
    fault_ = {true, is_write, address, running.thread};
    void* abandoned;
    simt_switch_context(&abandoned, main_);
}

std::string Scheduler::describe_fault() const {
    const std::string verb = fault_.is_write ? "write" : "read";
    if (stacks_.is_guard(fault_.address)) return "stack overflow";
    if (fault_.thread->block->shared->is_near(fault_.address))
        return "out-of-bounds " + verb + " far outside of the block's shared memory";
    const std::string forbidden = GuardedCopies::describe_forbidden(fault_.address);
    if (!forbidden.empty()) return verb + " " + forbidden;
    return "out-of-bounds " + verb + " " + GuardedCopies::describe(fault_.address);
}

}  // namespace simt
