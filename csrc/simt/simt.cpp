#include "simt/simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <utility>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace bbq::simt {
namespace {

constexpr size_t kStackBytes = 256 * 1024;  // touched pages only are real

struct Copy {
  Pointer<std::byte> target;
  Pointer<const std::byte> source;
  int bytes, valid;
};

enum class State { kReady, kAtWarp, kAtBarrier, kDone };

struct Thread {
  int index = 0;
  State state = State::kReady;
  const char* waits_for = "";
  Location waits_at;
  std::vector<Copy> uncommitted;
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

// Lanes that meet for one operation.
struct Meeting {
  const char* name = nullptr;
  uint32_t mask = 0, arrived = 0, to_leave = 0;
  Location location;
  Slots slots{};
  bool finished = false;
};

struct Warp {
  uint32_t time = 0;                                      // warp barriers passed
  std::vector<std::unique_ptr<Meeting>> meetings, ended;  // those that ended are used again
};

struct Block {
  const char* kernel;
  const std::function<void()>* body;
  Launch config;
  Dim index;
  Region shared;
  std::vector<std::byte> shared_bytes;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  uint32_t time = 0;  // block barriers passed
  int waiting = 0;
  bool vote = false, voted = false;  // of those that wait at the barrier; what the last barrier found
  Location barrier;
  std::exception_ptr failure;
};

Block* block = nullptr;      // that runs
Thread* running = nullptr;   // that runs: whose accesses these are
Thread* on_stack = nullptr;  // whose stack is in use; differs from `running` inside act_as_lane only
Order order = Order::kForward;
std::set<std::pair<std::string, int>> asked_for;  // synchronizations
std::pair<std::string, int> left_out;

// Remembers the place, and says whether it is to be left out.
bool is_left_out(const char* what, Location location) {
  std::pair<std::string, int> place{what, static_cast<int>(location.line())};
  const bool result = place == left_out;
  asked_for.insert(std::move(place));
  return result;
}

#if defined(__x86_64__)
void* scheduler_stack_pointer = nullptr;
extern "C" void bbq_simt_switch(void** save, void* load);
#else
ucontext_t scheduler_context;
#endif

// Memory for the stacks, kept from launch to launch.
std::byte* stack_of(int thread) {
  static std::vector<std::byte*> stacks;
  while (static_cast<int>(stacks.size()) <= thread) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, 4096, PROT_NONE);  // an overflow must not reach the next stack
    stacks.push_back(static_cast<std::byte*>(memory));
  }
  return stacks[thread];
}

void to_scheduler() {
#if defined(__x86_64__)
  bbq_simt_switch(&on_stack->stack_pointer, scheduler_stack_pointer);
#else
  swapcontext(&on_stack->context, &scheduler_context);
#endif
}

void to_thread(Thread& thread) {
  running = on_stack = &thread;
#if defined(__x86_64__)
  bbq_simt_switch(&scheduler_stack_pointer, thread.stack_pointer);
#else
  swapcontext(&scheduler_context, &thread.context);
#endif
  running = on_stack = nullptr;
}

void fiber() {
  try {
    (*block->body)();
  } catch (...) {
    if (!block->failure) block->failure = std::current_exception();
  }
  on_stack->state = State::kDone;
  to_scheduler();
}

void start(Thread& thread) {
  std::byte* stack = stack_of(thread.index);
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // the return address of `fiber`, which never returns
  *--top = reinterpret_cast<void*>(&fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // rbp, rbx, r12 to r15
  thread.stack_pointer = top;
#else
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = stack;
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, &fiber, 0);
#endif
}

int warp_of(int thread) { return thread / kWarpLanes; }
int lane_of(int thread) { return thread % kWarpLanes; }

std::string at(Location location) {
  std::string file = location.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(location.line());
}

std::string describe(const Thread& thread) {
  return "thread " + std::to_string(thread.index) + " of block " + std::to_string(block->index.x);
}

// Whether what `touch` records came surely before what `thread` does now.
bool ordered(const Touch& touch, const Thread& thread) {
  if (touch.thread == Touch::kNobody || touch.thread == thread.index || touch.block_time < block->time) return true;
  const int warp = warp_of(thread.index);
  return touch.warp == warp && touch.warp_time < block->warps[warp].time;
}

void check_race(Region& region, size_t offset, size_t bytes, Access access) {
  const Thread& me = *running;
  const int warp = warp_of(me.index);
  const Touch now{me.index, warp, block->time, block->warps[warp].time};
  for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
    Shadow& word = region.shadow[i];
    const auto complain = [&](const std::string& what) {
      fault(what + " of shared memory at byte " + std::to_string(2 * i));
    };
    if (word.in_flight) complain("use before the end of an asynchronous copy to it, without a wait,");
    if (access == Access::kRead && word.write.thread == Touch::kNobody) complain("read before any write");
    const bool both_atomic = access == Access::kAtomic && word.atomic;
    if (!both_atomic && !ordered(word.write, me)) {
      complain((access == Access::kRead ? "read" : "write") +
               std::string(" without a barrier after the write of thread ") + std::to_string(word.write.thread));
    }
    if (access == Access::kRead) {
      Touch& read = word.read;
      if (ordered(read, me)) {
        read = now;  // who comes after this comes after that
      } else {       // a later write must come after both
        if (read.warp != warp) read.warp = Touch::kSeveral;
        read.thread = Touch::kSeveral;
        read.warp_time = std::max(read.warp_time, now.warp_time);
      }
    } else {
      if (!both_atomic && !ordered(word.read, me)) complain("write without a barrier after a read by another thread");
      word.write = now;
      word.atomic = access == Access::kAtomic;
    }
  }
}

void finish_barrier() {
  ++block->time;
  for (Warp& warp : block->warps) ++warp.time;
  block->waiting = 0;
  block->voted = block->vote;
  block->vote = false;
  for (Thread& thread : block->threads) {
    if (thread.state == State::kAtBarrier) thread.state = State::kReady;
  }
}

// No thread can go on and not all are done: says what each group of threads waits for.
[[noreturn]] void report_deadlock() {
  std::string message =
      std::string(block->kernel) + ": divergent barrier in block " + std::to_string(block->index.x) + ": ";
  std::vector<std::pair<std::string, std::vector<int>>> groups;
  for (const Thread& thread : block->threads) {
    const std::string what = thread.state == State::kDone
                                 ? "ended"
                                 : std::string("wait for ") + thread.waits_for + " at " + at(thread.waits_at);
    auto found = std::find_if(groups.begin(), groups.end(), [&](const auto& group) { return group.first == what; });
    if (found == groups.end()) found = groups.insert(groups.end(), {what, {}});
    found->second.push_back(thread.index);
  }
  for (const auto& [what, threads] : groups) {
    message += std::to_string(threads.size()) + " threads (first: " + std::to_string(threads[0]) + ") " + what + "; ";
  }
  throw Fault(message.substr(0, message.size() - 2));
}

void run_block() {
  std::vector<int> turns(block->threads.size());
  for (size_t i = 0; i < turns.size(); ++i) turns[i] = static_cast<int>(i);
  if (order == Order::kReverse) std::reverse(turns.begin(), turns.end());
  std::mt19937 random(1);
  while (true) {
    if (order == Order::kShuffled) std::shuffle(turns.begin(), turns.end(), random);
    bool progress = false, all_done = true;
    for (int turn : turns) {
      Thread& thread = block->threads[turn];
      if (thread.state == State::kReady) {
        to_thread(thread);
        progress = true;
      }
      if (block->failure) std::rethrow_exception(block->failure);
      all_done = all_done && thread.state == State::kDone;
    }
    if (all_done) return;
    if (!progress) report_deadlock();
  }
}

}  // namespace

#if defined(__x86_64__)
// Saves the registers that a function must keep, exchanges the stacks, and returns on the other one.
asm(R"(
.text
.globl bbq_simt_switch
.hidden bbq_simt_switch
.type bbq_simt_switch, @function
bbq_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size bbq_simt_switch, .-bbq_simt_switch
)");
#endif

void set_order(Order value) { order = value; }

std::set<std::pair<std::string, int>> synchronizations() { return std::exchange(asked_for, {}); }
void leave_out(const std::string& what, int line) { left_out = {what, line}; }

void fault(const std::string& what) {
  throw Fault(running ? std::string(block->kernel) + ": " + describe(*running) + ": " + what : what);
}

void check_access(const Region* region, uintptr_t address, size_t bytes, size_t alignment, Access access) {
  if (!region) fault("access through a null pointer");
  const uintptr_t base = reinterpret_cast<uintptr_t>(region->base);
  if (address < base || address + bytes > base + region->bytes) {
    fault((access == Access::kRead ? "read" : "write") + std::string(" out of bounds: ") + std::to_string(bytes) +
          " bytes at byte " + std::to_string(static_cast<int64_t>(address - base)) + " of " + region->name +
          ", which has " + std::to_string(region->bytes));
  }
  if (address % alignment) fault("address in " + region->name + " is not aligned to " + std::to_string(alignment));
  if (running && !region->shadow.empty()) check_race(const_cast<Region&>(*region), address - base, bytes, access);
}

void launch(const char* kernel, const Launch& config, const std::function<void()>& body) {
  if (block) throw Fault("launch: a kernel is running");
  Block state;
  state.kernel = kernel;
  state.body = &body;
  state.config = config;
  struct Reset {
    ~Reset() {
      block = nullptr;
      running = on_stack = nullptr;
    }
  } reset;
  block = &state;
  state.shared_bytes.resize(config.shared_bytes + 128);
  std::byte* memory = state.shared_bytes.data();
  memory += (128 - reinterpret_cast<uintptr_t>(memory) % 128) % 128;
  for (int64_t z = 0; z < config.grid.z; ++z) {
    for (int64_t y = 0; y < config.grid.y; ++y) {
      for (int64_t x = 0; x < config.grid.x; ++x) {
        state.index = {x, y, z};
        state.shared = {"shared memory", memory, static_cast<size_t>(config.shared_bytes),
                        std::vector<Shadow>((config.shared_bytes + 1) / 2)};
        std::memset(memory, 0xff, config.shared_bytes);  // NaN as float of any width, -1 as integer
        state.threads = std::vector<Thread>(config.threads);
        state.warps = std::vector<Warp>((config.threads + kWarpLanes - 1) / kWarpLanes);
        state.time = 1;
        state.waiting = 0;
        state.vote = state.voted = false;
        for (int i = 0; i < config.threads; ++i) {
          state.threads[i].index = i;
          start(state.threads[i]);
        }
        run_block();
      }
    }
  }
}

int thread_index() { return running->index; }
int block_threads() { return block->config.threads; }
Dim block_index() { return block->index; }
Dim grid_size() { return block->config.grid; }
Pointer<std::byte> shared_memory() { return {reinterpret_cast<uintptr_t>(block->shared.base), &block->shared}; }

void sync_threads(Location location) {
  if (is_left_out("barrier", location)) return;
  Thread& me = *running;
  if (block->waiting && (block->barrier.line() != location.line() ||
                         std::strcmp(block->barrier.file_name(), location.file_name()) != 0)) {
    fault("divergent barrier: waits at " + at(location) + " while others wait at " + at(block->barrier));
  }
  block->barrier = location;
  me.waits_for = "the barrier";
  me.waits_at = location;
  me.state = State::kAtBarrier;
  if (++block->waiting == static_cast<int>(block->threads.size())) {
    finish_barrier();
  } else {
    to_scheduler();
  }
}

bool sync_threads_or(bool vote, Location location) {
  if (is_left_out("barrier", location)) return vote;
  block->vote = block->vote || vote;
  sync_threads(location);
  return block->voted;  // no barrier can end before this thread comes to it
}

Slot exchange(const char* name, uint32_t mask, const Slot& operand, const std::function<void(Slots&)>& finish,
              Location location) {
  Thread& me = *running;
  Warp& warp = block->warps[warp_of(me.index)];
  const int lane = lane_of(me.index);
  const uint32_t bit = uint32_t{1} << lane;
  if (!(mask & bit)) fault(std::string(name) + " at " + at(location) + ": the mask does not hold the calling lane");
  Meeting* meeting = nullptr;
  for (auto& open : warp.meetings) {
    if (open->finished || !(open->mask & mask)) continue;
    if (open->mask != mask || open->location.line() != location.line() || std::strcmp(open->name, name) != 0) {
      fault(std::string("divergent warp: ") + name + " at " + at(location) + " while other lanes wait for " +
            open->name + " at " + at(open->location));
    }
    meeting = open.get();
  }
  if (!meeting) {
    if (warp.ended.empty()) warp.ended.push_back(std::make_unique<Meeting>());
    warp.meetings.push_back(std::move(warp.ended.back()));
    warp.ended.pop_back();
    meeting = warp.meetings.back().get();
    meeting->name = name;
    meeting->mask = meeting->to_leave = mask;
    meeting->arrived = 0;
    meeting->location = location;
    meeting->finished = false;
  }
  meeting->slots[lane] = operand;
  meeting->arrived |= bit;
  if (meeting->arrived == mask) {
    finish(meeting->slots);
    act_as_lane(lane);
    meeting->finished = true;
    for (int i = 0; i < kWarpLanes; ++i) {
      if ((mask >> i & 1) && i != lane) block->threads[warp_of(me.index) * kWarpLanes + i].state = State::kReady;
    }
  } else {
    me.state = State::kAtWarp;
    me.waits_for = name;
    me.waits_at = location;
    to_scheduler();
  }
  const Slot result = meeting->slots[lane];
  meeting->to_leave &= ~bit;
  if (!meeting->to_leave) {
    const auto ended = std::find_if(warp.meetings.begin(), warp.meetings.end(),
                                    [&](const auto& open) { return open.get() == meeting; });
    warp.ended.push_back(std::move(*ended));
    warp.meetings.erase(ended);
  }
  return result;
}

void act_as_lane(int lane) {
  const int warp = warp_of(running->index);
  running = &block->threads[warp * kWarpLanes + lane];
}

void sync_warp(uint32_t mask, Location location) {
  if (is_left_out("warp barrier", location)) return;
  Warp& warp = block->warps[warp_of(running->index)];
  exchange("a warp barrier", mask, {}, [&](Slots&) { warp.time += mask == kAllLanes; }, location);
}

uint32_t ballot(bool vote, uint32_t mask, Location location) {
  return warp_operation<bool, uint32_t>(
      "a vote", mask, vote,
      [mask](const auto& votes, auto& results) {
        uint32_t bits = 0;
        for (int i = 0; i < kWarpLanes; ++i) bits |= uint32_t{(mask >> i & 1) && votes[i]} << i;
        results.fill(bits);
      },
      location);
}

void async_copy(Pointer<std::byte> target, Pointer<const std::byte> source, int bytes, int valid) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fault("an asynchronous copy of " + std::to_string(bytes) + " bytes");
  if (valid) check_access(source.region(), source.address(), valid, bytes, Access::kRead);
  check_access(target.region(), target.address(), bytes, bytes, Access::kWrite);
  if (target.region()->shadow.empty()) fault("an asynchronous copy to memory that is not shared");
  std::memset(reinterpret_cast<void*>(target.address()), 0xff, bytes);
  const size_t offset = target.address() - reinterpret_cast<uintptr_t>(target.region()->base);
  for (size_t i = offset / 2; i < (offset + bytes) / 2; ++i) target.region()->shadow[i].in_flight = true;
  running->uncommitted.push_back({target, source, bytes, valid});
}

void async_commit() {
  running->groups.push_back(std::move(running->uncommitted));
  running->uncommitted.clear();
}

void async_wait(int still_in_flight, Location location) {
  if (is_left_out("wait", location)) return;
  auto& groups = running->groups;
  while (static_cast<int>(groups.size()) > still_in_flight) {
    for (const Copy& copy : groups.front()) {
      Region& region = *copy.target.region();
      const size_t offset = copy.target.address() - reinterpret_cast<uintptr_t>(region.base);
      for (size_t i = offset / 2; i < (offset + copy.bytes) / 2; ++i) region.shadow[i].in_flight = false;
      check_access(&region, copy.target.address(), copy.bytes, copy.bytes, Access::kWrite);
      std::byte* target = reinterpret_cast<std::byte*>(copy.target.address());
      std::memset(target, 0, copy.bytes);
      if (copy.valid) std::memcpy(target, reinterpret_cast<const void*>(copy.source.address()), copy.valid);
    }
    groups.erase(groups.begin());
  }
}

std::array<uint32_t, 4> load_matrices(Pointer<const uint16_t> row, Location location) {
  return warp_operation<Pointer<const uint16_t>, std::array<uint32_t, 4>>(
      "a matrix load", kAllLanes, row,
      [](const auto& rows, auto& results) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          for (int r = 0; r < 8; ++r) {
            act_as_lane(8 * matrix + r);
            const auto words = rows[8 * matrix + r].template as<const std::array<uint32_t, 4>>().read(16);
            for (int pair = 0; pair < 4; ++pair) results[4 * r + pair][matrix] = words[pair];
          }
        }
      },
      location);
}

std::array<uint32_t, 4> load_matrices_across(Pointer<const uint16_t> row, Location location) {
  return warp_operation<Pointer<const uint16_t>, std::array<uint32_t, 4>>(
      "a transposed matrix load", kAllLanes, row,
      [](const auto& rows, auto& results) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          std::array<std::array<uint16_t, 8>, 8> elements;
          for (int r = 0; r < 8; ++r) {
            act_as_lane(8 * matrix + r);
            elements[r] = rows[8 * matrix + r].template as<const std::array<uint16_t, 8>>().read(16);
          }
          for (int lane = 0; lane < kWarpLanes; ++lane) {
            const int column = lane / 4, first = 2 * (lane % 4);
            results[lane][matrix] = elements[first][column] | uint32_t{elements[first + 1][column]} << 16;
          }
        }
      },
      location);
}

std::array<float, 4> multiply_tiles(Tile kind, const std::array<uint32_t, 4>& a, const std::array<uint32_t, 2>& b,
                                    const std::array<float, 4>& c, Location location) {
  struct Operand {
    std::array<uint32_t, 4> a;
    std::array<uint32_t, 2> b;
    std::array<float, 4> c;
  };
  const auto element = [kind](uint32_t word, int which) {
    const uint16_t bits = static_cast<uint16_t>(which ? word >> 16 : word);
    if (kind == Tile::kHalf) return to_float(Half{bits});
    if (kind == Tile::kBFloat16) return to_float(BFloat16{bits});
    return std::bit_cast<float>(word & ~uint32_t{0x1fff});  // tensor cores ignore the lower bits of tf32
  };
  const auto finish = [&](const auto& lanes, auto& results) {
    // PTX ISA, "Matrix Fragments for mma.m16n8k16" and "... mma.m16n8k8": rows lane / 4 (+ 8), pairs of columns.
    const bool wide = kind == Tile::kTf32;
    const int depth = wide ? 8 : 16;
    float left[16][16], right[16][8];
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      const int group = lane / 4, member = lane % 4;
      for (int i = 0; i < 4; ++i) {
        const int row = group + 8 * (i % 2), first = wide ? member + 4 * (i / 2) : 2 * member + 8 * (i / 2);
        for (int j = 0; j < (wide ? 1 : 2); ++j) left[row][first + j] = element(lanes[lane].a[i], j);
      }
      for (int i = 0; i < 2; ++i) {
        const int first = wide ? member + 4 * i : 2 * member + 8 * i;
        for (int j = 0; j < (wide ? 1 : 2); ++j) right[first + j][group] = element(lanes[lane].b[i], j);
      }
    }
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        double sum = lanes[lane].c[i];
        for (int k = 0; k < depth; ++k) sum += double(left[row][k]) * right[k][column];
        float rounded = static_cast<float>(sum);
        if (std::isfinite(sum) && std::fabs(double(rounded)) > std::fabs(sum)) rounded = std::nextafter(rounded, 0.0f);
        results[lane][i] = rounded;
      }
    }
  };
  return warp_operation<Operand, std::array<float, 4>>("a tile product", kAllLanes, {a, b, c}, finish, location);
}

}  // namespace bbq::simt
