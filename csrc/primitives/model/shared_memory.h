// Shared memory of a CTA: bytes, poisoned until written, and a shadow of who last touched each word.
#pragma once

#include <cstdint>
#include <vector>

#include "primitives/model/knowledge.h"
#include "primitives/primitives.h"

namespace aadkern::host_model {

struct Thread;

// An access as others must be ordered after it.
struct Stamp {
    int agent;
    uint32_t time;
};
struct Writer {
    int agent;
    uint32_t time;
    bool generic;  // written by ld/st, so that an asynchronous reader needs a proxy fence besides
};

class SharedMemory {
public:
    SharedMemory();
    ~SharedMemory();
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;
    // Everything NaN and never written.
    void reset(SharedAddress base, uint32_t bytes);
    SharedAddress base() const { return base_; }
    uint8_t* at(SharedAddress address) { return bytes_ + address; }
    bool contains(SharedAddress address, uint64_t bytes) const {
        return address >= base_ && address + bytes <= uint64_t(base_) + size_;
    }
    // Reports a misaligned or outside access.
    bool check(SharedAddress address, uint32_t bytes, uint32_t alignment, const char* what) const;

    // Record an access by the current thread: of its own (generic proxy) or on behalf of an asynchronous agent.
    void read(SharedAddress address, uint32_t bytes, const char* what);
    void write(SharedAddress address, uint32_t bytes, const char* what);
    void read_async(SharedAddress address, uint32_t bytes, Stamp stamp, const char* what);
    void write_async(SharedAddress address, uint32_t bytes, Stamp stamp, Swizzle swizzle, const char* what);
    // wgmma: all its threads must be ordered after the writers, so they are returned rather than checked. False: reported already.
    bool read_operand(SharedAddress address, uint32_t bytes, Stamp stamp, Swizzle swizzle, std::vector<Writer>& writers,
                      const char* what);
    void poison(SharedAddress address, uint32_t bytes);

private:
    static constexpr int kReaders = 4;
    static constexpr int kNobody = -1, kMany = -2;
    struct Word {
        int writer = kNobody;
        uint32_t written = 0;
        bool generic = false;
        int8_t swizzle = -1;  // of the TMA load that wrote it
        int readers = 0;      // more than kReaders: `many` holds them all
        int many = -1;
        Stamp reader[kReaders];
    };
    Word& word(SharedAddress address) { return words_[(address - base_) / 4]; }
    void check_writer(const Word& word, SharedAddress address, bool async, const char* what) const;
    void check_readers(const Word& word, SharedAddress address, const char* what) const;
    void add_reader(Word& word, Stamp stamp);

    uint8_t* bytes_;
    SharedAddress base_ = 0;
    uint32_t size_ = 0;
    std::vector<Word> words_;
    std::vector<Clock> clocks_;  // reading clocks of words with many readers
    std::vector<int> free_clocks_;
};

// Is this thread ordered after the write? For an asynchronous reader, after a proxy fence too if it was generic.
bool knows(const Thread& thread, const Writer& writer, bool async);

}  // namespace aadkern::host_model
