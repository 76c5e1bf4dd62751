// Runs a launch: which CTAs are resident, which thread goes next, when asynchronous work is done, and what is wrong at the end.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <deque>

#include "primitives/model/machine.h"

namespace aadkern::host_model {

Machine machine;

namespace {

struct Work {
    Cta* cta;  // null: detached
    int queue;
    std::function<void()> run;
};
// How the next thread is found; in random mode drawn by seed. ByWarp: of the warp that the priorities prefer, so that some run far
// ahead.
enum class Choice { Uniform, ByWarp, InTurn };

// Threads that can go on, by warp.
class Ready {
public:
    void reset(size_t warps) {
        warps_ = std::vector<std::deque<Thread*>>(warps);
        priority_.resize(warps);
        for (auto& priority : priority_) priority = machine.random();
        count_ = next_ = 0;
    }
    bool empty() const { return count_ == 0; }
    void add(Thread* thread) {
        warps_[size_t(thread->cta->slot * (machine.launch.threads / 32) + thread->index / 32)].push_back(thread);
        count_++;
    }
    Thread* take(Choice choice);

private:
    size_t from(size_t warp) const {  // the first at or after this one that has a thread
        while (warps_[warp].empty()) warp = (warp + 1) % warps_.size();
        return warp;
    }
    std::vector<std::deque<Thread*>> warps_;
    std::vector<uint32_t> priority_;
    size_t count_ = 0, next_ = 0;
};

Thread* Ready::take(Choice choice) {
    size_t warp = from(choice == Choice::Uniform ? machine.random() % warps_.size() : next_);
    if (choice == Choice::ByWarp) {
        if (machine.report.switches % 1024 == 0) {  // anew, so that a warp that spins does not keep the others out
            for (auto& priority : priority_) priority = machine.random();
        }
        for (size_t i = 0; i < warps_.size(); i++) {
            if (!warps_[i].empty() && priority_[i] > priority_[warp]) warp = i;
        }
    }
    auto& threads = warps_[warp];
    if (choice != Choice::InTurn) std::swap(threads.front(), threads[machine.random() % threads.size()]);
    Thread* thread = threads.front();
    threads.pop_front();
    count_--;
    next_ = (warp + 1) % warps_.size();
    return thread;
}

Ready ready;
std::vector<Thread*> spinning;  // go on when the others cannot, or at random
std::deque<Work> pending;
Choice choice;
int64_t next_block, blocks;

void set_current(Cta* cta, Thread* thread) {
    machine.current_cta = cta;
    machine.current = thread;
}

void run_pending(size_t index) {
    // An ordered queue runs its oldest work first, whichever was drawn.
    if (pending[index].queue > 0) {
        for (size_t i = 0; i < index; i++) {
            if (pending[i].cta == pending[index].cta && pending[i].queue == pending[index].queue) index = i;
        }
    }
    Work work = std::move(pending[index]);
    pending.erase(pending.begin() + int64_t(index));
    set_current(work.cta, nullptr);
    work.run();
}

// At random; in lazy mode in turn, but what has left its CTA waits for everything else, and the newest of it goes first.
size_t next_pending() {
    if (machine.options.completion == int(Completion::Random)) return machine.random() % pending.size();
    for (size_t i = 0; i < pending.size(); i++) {
        if (pending[i].cta != nullptr) return i;
    }
    return pending.size() - 1;
}

void end_of_thread(Thread& thread) {
    const BulkUse& bulk = thread.bulk;
    const bool uncommitted = bulk.groups.back()->reading + bulk.groups.back()->writing > 0;
    if (bulk.agent >= 0 && (uncommitted || int(thread.knows.past[bulk.agent]) < bulk.committed())) {
        error("exit", "exits without a bulk_wait_read for its bulk stores%s", uncommitted ? " (some not committed)" : "");
    }
    if (!thread.wgmma.chains.empty()) error("exit", "exits without a wgmma_wait for its accumulators");
    thread.state = Thread::State::Done;
    thread.cta->running--;
}

void start_cta(Cta& cta, int64_t linear) {
    const Launch& launch = machine.launch;
    cta.block[0] = int(linear % launch.grid[0]);
    cta.block[1] = int(linear / launch.grid[0] % launch.grid[1]);
    cta.block[2] = int(linear / launch.grid[0] / launch.grid[1]);
    const size_t threads = size_t(launch.threads);
    cta.agents.clear();
    cta.agent_capacity = threads + threads / 32 + 128;
    cta.memory.reset(1024 + 16 * SharedAddress(machine.options.seed % 64), uint32_t(launch.shared_bytes));
    cta.mbarriers.clear();
    for (auto& barrier : cta.named_barriers) {
        barrier = NamedBarrier();
        barrier.arriving.reset(cta.agent_capacity, threads);
        barrier.complete.reset(cta.agent_capacity, threads);
    }
    cta.warps.assign(threads / 32, Warp());
    for (auto& warp : cta.warps) warp.arriving.reset(cta.agent_capacity, threads);
    cta.warpgroups = std::vector<Warpgroup>(threads / 128);
    for (size_t i = 0; i < cta.warpgroups.size(); i++) {
        cta.warpgroups[i].agent = cta.new_agent("wgmma of warpgroup " + std::to_string(i));
        for (int warp = 1; warp < 4; warp++) cta.new_agent("wgmma of warpgroup " + std::to_string(i));
    }
    cta.free_registers = 0;
    cta.waiting_for_registers.clear();
    cta.running = launch.threads;
    while (cta.threads.size() < threads) cta.threads.push_back(std::make_unique<Thread>());
    for (size_t i = 0; i < threads; i++) {
        Thread& thread = *cta.threads[i];
        thread.cta = &cta;
        thread.index = int(i);
        thread.state = Thread::State::Ready;
        thread.knows.reset(cta.agent_capacity, threads);
        thread.knows.past.raise(thread.index, 1);
        thread.wgmma = WgmmaUse();
        thread.bulk = BulkUse();
        thread.registers = launch.registers ? launch.registers : std::min(65536 / launch.threads / 8 * 8, 248);
        ready.add(&thread);
    }
}

void start_threads(Cta& cta, const std::function<void()>& kernel) {
    for (auto& thread : cta.threads) {
        Thread* it = thread.get();
        it->fiber.start([it, &kernel] {
            kernel();
            end_of_thread(*it);
        });
    }
}

void end_of_cta(Cta& cta) {
    set_current(&cta, nullptr);
    for (auto& [address, mbarrier] : cta.mbarriers) {
        if (!mbarrier.landing.empty())
            error("exit", "ends with TMA loads in flight to the mbarrier at shared+%u", address - cta.memory.base());
    }
    for (int i = 0; i < 16; i++) {
        if (cta.named_barriers[i].arrived)
            error("exit", "ends with %d arrivals at named barrier %d", cta.named_barriers[i].arrived, i);
    }
    for (size_t i = 0; i < cta.threads.size(); i += 128) {
        if (cta.threads[i]->registers != cta.threads[std::min(i + 127, cta.threads.size() - 1)]->registers) {
            error("registers", "warpgroup %zu ends with different setmaxnreg in its warps", i / 128);
        }
    }
    for (size_t i = 0; i < pending.size();) {  // what has not read shared memory yet does so now
        if (pending[i].cta == &cta) {
            run_pending(i);
            i = 0;
        } else {
            i++;
        }
    }
}

void report_deadlock() {
    std::map<std::string, std::vector<const Thread*>> waits;
    for (auto& cta : machine.ctas) {
        for (auto& thread : cta->threads) {
            if (thread->state != Thread::State::Blocked) continue;
            set_current(cta.get(), thread.get());
            std::string what = thread->waiting_for();
            if (machine.ctas.size() > 1) what = "cta " + std::to_string(cta->block[0]) + ": " + what;
            waits[what].push_back(thread.get());
        }
    }
    std::string text = "nothing can go on:";
    for (auto& [what, threads] : waits) {
        text += " {" + std::to_string(threads.size()) + " threads " + std::to_string(threads.front()->index) + ".." +
                std::to_string(threads.back()->index) + ": " + what + "}";
    }
    machine.current = nullptr;
    error("deadlock", "%s", text.c_str());
}

// One step. False: the launch cannot go on.
bool step() {
    const bool random = machine.options.completion == int(Completion::Random);
    if (!spinning.empty() && ((ready.empty() && pending.empty()) || (random && machine.random() % 16 == 0))) {
        for (Thread* thread : spinning) ready.add(thread);
        spinning.clear();
    }
    if (!pending.empty() && (ready.empty() || (random && machine.random() % 64 == 0))) {
        run_pending(next_pending());
        return true;
    }
    if (ready.empty()) {
        report_deadlock();
        return false;
    }
    if (++machine.report.switches > machine.options.max_switches) {
        error("livelock", "no end after %lld switches between threads", (long long)machine.options.max_switches);
        return false;
    }
    Thread* thread = ready.take(choice);
    set_current(thread->cta, thread);
    thread->fiber.resume();
    return true;
}

void run_all(const std::function<void()>& kernel) {
    const auto start_next = [&](Cta& cta) {
        start_cta(cta, next_block++);
        start_threads(cta, kernel);
    };
    for (int i = 0; i < std::max(1, machine.options.resident_ctas) && next_block < blocks; i++) {
        machine.ctas.push_back(std::make_unique<Cta>());
        machine.ctas.back()->slot = i;
        start_next(*machine.ctas.back());
    }
    size_t alive = machine.ctas.size();
    while (alive > 0) {
        if (!step()) return;
        Cta* cta = machine.current_cta;
        if (cta == nullptr || machine.current == nullptr || cta->running > 0) continue;
        end_of_cta(*cta);
        if (next_block < blocks) {
            start_next(*cta);
        } else {
            alive--;
        }
    }
    while (!pending.empty()) run_pending(next_pending());
}

}  // namespace

int Cta::new_agent(const std::string& name) {
    const size_t agent = size_t(machine.launch.threads) + agents.size();
    if (agent + 1 >= agent_capacity) {  // the last is shared by all that come too late
        error("model", "more than %zu mbarriers and storing threads in a CTA", agent_capacity - size_t(machine.launch.threads));
        return int(agent_capacity) - 1;
    }
    agents.push_back(name);
    return int(agent);
}

std::string Cta::agent_name(int agent) const {
    if (agent < machine.launch.threads) return "thread " + std::to_string(agent);
    const size_t index = size_t(agent - machine.launch.threads);
    return index < agents.size() ? agents[index] : "an agent";
}

void error(const char* kind, const char* format, ...) {
    Report::Kind& entry = machine.report.kinds[kind];
    if (entry.count++ > 0) return;
    char text[1024], place[128] = "";
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (const Cta* cta = machine.current_cta) {
        std::snprintf(place, sizeof place, "cta (%d, %d, %d): ", cta->block[0], cta->block[1], cta->block[2]);
    }
    entry.first = place;
    if (const Thread* thread = machine.current) {
        std::snprintf(place, sizeof place, "thread %d (warpgroup %d, warp %d) ", thread->index, thread->index / 128,
                      thread->index / 32);
        entry.first += place;
    }
    entry.first += text;
}

void wake(WaitList& list) {
    for (Thread* thread : list) {
        if (thread->state != Thread::State::Blocked) continue;
        thread->state = Thread::State::Ready;
        ready.add(thread);
    }
    list.clear();
}

void block(WaitList& list, std::function<std::string()> waiting_for) {
    Thread& thread = self();
    thread.state = Thread::State::Blocked;
    thread.waiting_for = std::move(waiting_for);
    list.push_back(&thread);
    thread.fiber.suspend();
}

void yield() {
    Thread& thread = self();
    ready.add(&thread);
    thread.fiber.suspend();
}

void spin() {
    Thread& thread = self();
    spinning.push_back(&thread);
    thread.fiber.suspend();
}

void yield_sometimes() {
    if (machine.randomly(8)) yield();
}

void post(int queue, std::function<void()> work) {
    if (machine.options.completion == int(Completion::Eager)) {
        work();
    } else {
        pending.push_back({queue == kDetached ? nullptr : machine.current_cta, queue, std::move(work)});
    }
}

std::string Report::text() const {
    std::string text;
    for (auto& [name, kind] : kinds) text += name + "\t" + std::to_string(kind.count) + "\t" + kind.first + "\n";
    return text;
}

Report launch(const Launch& launch, const Options& options, const std::function<void()>& kernel) {
    machine = Machine();
    machine.launch = launch;
    machine.options = options;
    machine.random_state = options.seed * 0x9E3779B97F4A7C15ull + 1;
    for (int i = 0; i < 3; i++) machine.random();
    spinning.clear();
    pending.clear();
    if (launch.threads % 32 != 0 || launch.threads < 32 || launch.threads > 1024) {
        error("model", "%d threads a CTA", launch.threads);
        return machine.report;
    }
    choice = options.completion == int(Completion::Random) ? Choice(machine.random() % 3) : Choice::InTurn;
    ready.reset(size_t(std::max(1, options.resident_ctas) * launch.threads / 32));
    next_block = 0;
    blocks = int64_t(launch.grid[0]) * launch.grid[1] * launch.grid[2];
    run_all(kernel);
    set_current(nullptr, nullptr);
    return machine.report;
}

int write_report(const Report& report, char* buffer, int size) {
    if (size > 0) std::snprintf(buffer, size_t(size), "%s", report.text().c_str());
    return int(report.kinds.size());
}

}  // namespace aadkern::host_model
