// Executes CUDA kernel bodies on the host, for tests: strict where a GPU is lenient.
//
// The threads of a block are fibers, run one after another in a chosen order. Every access goes through a `Pointer`,
// which knows its region of memory: an access outside of it is a fault. For shared memory each word remembers who
// wrote and read it: reading what nobody wrote, what an asynchronous copy has not delivered, or what another thread
// touched without a barrier between is a fault, whatever order the threads happened to run in. Warp operations wait
// for all lanes of their mask; lanes that wait for different things are a fault that names both.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <set>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/floats.h"

namespace bbq::simt {

constexpr int kWarpLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffff;

// What a kernel did wrong, and which thread did it.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Who touched two bytes of shared memory last, and when. Times are counted in barriers.
struct Touch {
  static constexpr int32_t kNobody = -1, kSeveral = -2;  // kSeveral: lanes of `warp`, or of several warps if that is -2
  int32_t thread = kNobody, warp = kNobody;
  uint32_t block_time = 0, warp_time = 0;
};
struct Shadow {
  Touch write, read;
  bool atomic = false, in_flight = false;
};

// One allocation that kernels may touch.
struct Region {
  std::string name;
  std::byte* base = nullptr;
  size_t bytes = 0;
  std::vector<Shadow> shadow;  // of shared memory: one for each two bytes
};

enum class Access { kRead, kWrite, kAtomic };

// Throws where the running thread must not do this; otherwise remembers that it did.
void check_access(const Region* region, uintptr_t address, size_t bytes, size_t alignment, Access access);

template <class T>
class Reference;

// A pointer that knows how far it may reach. `T` is const where memory is only read.
template <class T>
class Pointer {
 public:
  using Value = std::remove_const_t<T>;

  Pointer() = default;
  Pointer(std::nullptr_t) {}
  Pointer(uintptr_t address, Region* region) : address_(address), region_(region) {}
  operator Pointer<const T>() const { return {address_, region_}; }
  explicit operator bool() const { return region_ != nullptr; }

  template <class U>
  Pointer<U> as() const {
    return {address_, region_};
  }
  Pointer operator+(int64_t n) const { return {address_ + static_cast<uintptr_t>(n) * sizeof(T), region_}; }
  auto operator[](int64_t i) const {
    if constexpr (std::is_const_v<T>) {
      return (*this + i).read();
    } else {
      return Reference<T>(*this + i);
    }
  }
  Value read(size_t alignment = alignof(T)) const {
    check_access(region_, address_, sizeof(T), alignment, Access::kRead);
    Value value;
    std::memcpy(&value, reinterpret_cast<const void*>(address_), sizeof(T));
    return value;
  }
  void write(const Value& value, size_t alignment = alignof(T), Access access = Access::kWrite) const {
    check_access(region_, address_, sizeof(T), alignment, access);
    std::memcpy(reinterpret_cast<void*>(address_), &value, sizeof(T));
  }
  uintptr_t address() const { return address_; }
  Region* region() const { return region_; }

 private:
  uintptr_t address_ = 0;
  Region* region_ = nullptr;
};

template <class T>
class Reference {
 public:
  explicit Reference(Pointer<T> pointer) : pointer_(pointer) {}
  operator T() const { return pointer_.read(); }
  T operator=(const T& value) const {
    pointer_.write(value);
    return value;
  }
  T operator=(const Reference& other) const { return *this = T(other); }
  T operator+=(const T& value) const { return *this = T(*this) + value; }
  T operator-=(const T& value) const { return *this = T(*this) - value; }

 private:
  Pointer<T> pointer_;
};

// Synchronization that kernels of this process asked for since the last call, each place once: what it was ("barrier",
// "warp barrier" or "wait") and the line of the kernel.
std::set<std::pair<std::string, int>> synchronizations();
// Leaves one of them out of the launches that follow, for tests that want it missed; {"", 0}: none.
void leave_out(const std::string& what, int line);

struct Dim {
  int64_t x = 1, y = 1, z = 1;
};

enum class Order { kForward, kReverse, kShuffled };

// How the threads of a block take turns in the launches of this process. Results must not depend on it.
void set_order(Order order);

struct Launch {
  Dim grid;
  int threads = 1;
  int shared_bytes = 0;
};

// Runs `body` in every thread of every block, one block after another. Throws the first fault.
void launch(const char* kernel, const Launch& config, const std::function<void()>& body);

// Below: what the running thread may ask for. Locations name the line of the kernel in faults.
using Location = std::source_location;

int thread_index();
int block_threads();
Dim block_index();
Dim grid_size();
Pointer<std::byte> shared_memory();
[[noreturn]] void fault(const std::string& what);

void sync_threads(Location location);
bool sync_threads_or(bool vote, Location location);

// Operands and results of one warp operation, lane by lane.
using Slot = std::array<std::byte, 64>;
using Slots = std::array<Slot, kWarpLanes>;

// Waits until all lanes of `mask` called this with the same name and from the same line; the last one runs `finish`,
// which turns operands into results. Returns the caller's result.
Slot exchange(const char* name, uint32_t mask, const Slot& operand, const std::function<void(Slots&)>& finish,
              Location location);
void sync_warp(uint32_t mask, Location location);

// Within `finish`: makes a lane of the same warp the running thread.
void act_as_lane(int lane);

template <class Operand, class Result, class Finish>
Result warp_operation(const char* name, uint32_t mask, const Operand& operand, Finish finish, Location location) {
  static_assert(sizeof(Operand) <= sizeof(Slot) && sizeof(Result) <= sizeof(Slot));
  static_assert(std::is_trivially_copyable_v<Operand> && std::is_trivially_copyable_v<Result>);
  Slot slot{};
  std::memcpy(slot.data(), &operand, sizeof(Operand));
  const auto run = [&](Slots& slots) {
    std::array<Operand, kWarpLanes> operands{};
    std::array<Result, kWarpLanes> results{};
    for (int i = 0; i < kWarpLanes; ++i) std::memcpy(&operands[i], slots[i].data(), sizeof(Operand));
    finish(operands, results);
    for (int i = 0; i < kWarpLanes; ++i) std::memcpy(slots[i].data(), &results[i], sizeof(Result));
  };
  slot = exchange(name, mask, slot, run, location);
  Result result;
  std::memcpy(&result, slot.data(), sizeof(Result));
  return result;
}

// Each lane gets the value of the lane that it names; a lane outside the mask has none to give.
template <class T>
T shuffle(T value, int source, uint32_t mask, Location location) {
  struct Operand {
    T value;
    int source;
  };
  return warp_operation<Operand, T>(
      "a shuffle", mask, {value, source & (kWarpLanes - 1)},
      [mask](const auto& operands, auto& results) {
        for (int i = 0; i < kWarpLanes; ++i) {
          if (!(mask >> i & 1)) continue;
          const int from = operands[i].source;
          if (!(mask >> from & 1)) {
            fault("lane " + std::to_string(i) + " shuffles from lane " + std::to_string(from) + ", not in the mask");
          }
          results[i] = operands[from].value;
        }
      },
      location);
}

uint32_t ballot(bool vote, uint32_t mask, Location location);

// Copies to shared memory that arrive when the thread waits for their group. Until then the target holds NaN.
// `valid` bytes are read from `source`, the rest of `bytes` is filled with zeros.
void async_copy(Pointer<std::byte> target, Pointer<const std::byte> source, int bytes, int valid);
void async_commit();
void async_wait(int groups_still_in_flight, Location location);

// Four 8x8 matrices of 16-bit elements; the rows of matrix m are named by lanes 8m to 8m + 7.
std::array<uint32_t, 4> load_matrices(Pointer<const uint16_t> row, Location location);
// The same, each matrix transposed.
std::array<uint32_t, 4> load_matrices_across(Pointer<const uint16_t> row, Location location);

enum class Tile { kHalf, kBFloat16, kTf32 };

// d = a b + c for a 16 x depth, b depth x 8, with the element layout of PTX's mma.m16n8k16 (16-bit) and m16n8k8 (tf32).
// Products are exact, their sum with c is rounded once, towards zero: not better than any tensor core.
std::array<float, 4> multiply_tiles(Tile kind, const std::array<uint32_t, 4>& a, const std::array<uint32_t, 2>& b,
                                    const std::array<float, 4>& c, Location location);

}  // namespace bbq::simt
